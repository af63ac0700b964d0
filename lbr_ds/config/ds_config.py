"""A ds_config: checked, and its keys as one value with DeepSpeed's defaults filled in.

    layout = load("zero3")            # layout.config: the JSON object, as DeepSpeed will get it

A ds_config lays out memory and nothing else; a key that the recipe owns is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lbr_ds.errors import ConfigError, short
from lbr_ds.system import resources
from lbr_ds.system.failures import reading
from lbr_ds.system.yaml_json import read_json

OWNED_BY_RECIPE = {
    "train_batch_size": "stageN.samples_per_step",
    "train_micro_batch_size_per_gpu": "stageN.micro_batch_tokens",
    "gradient_accumulation_steps": "stageN.micro_batch_tokens",
    "gradient_clipping": "stageN.optim.clip",
    "optimizer": "stageN.optim",
    "scheduler": "stageN.optim",
    "activation_checkpointing": "model.activation_checkpointing",
}
_PARTS = ("zero_optimization", "bf16", "fp16", "data_types")
_WIDTH = {None: 0, "fp32": 4, "bf16": 2, "bfp16": 2, "fp16": 2}  # bytes of a number, by its name


def resolve_name(name: str, *, gpu: bool) -> str:
    """Return the name of a ds_config; `auto` means zero3, or zero3_cpu without a GPU."""
    if name != "auto":
        return name
    return "zero3" if gpu else "zero3_cpu"


def load(name: str) -> Layout:
    """Return a ds_config by shipped name or path. Raises ConfigError as `read` does."""
    config = read(name)
    with reading(name, "the ds_config", ConfigError, "give each key a value of DeepSpeed's type"):
        return Layout.of(name, config)


def read(name: str) -> dict[str, Any]:
    """Return the JSON object of a ds_config, by shipped name or path.

    Raises:
        ConfigError: it is not a JSON object, has no ZeRO stage from 1 to 3, sets a key that the
            recipe owns, or asks for something that is not supported.
    """
    path = resources.find_shipped("ds_configs", name, ".json")
    config = read_json(path, "a ds_config", ConfigError, "correct it")
    for key, owner in OWNED_BY_RECIPE.items():
        if key in config:
            raise ConfigError(f"{path}: {key} belongs to the recipe; remove it and set {owner}")
    for key in _PARTS:
        if not isinstance(config.get(key, {}), dict):
            raise ConfigError(f"{path}: {key}={short(config[key])}; make it an object, {{...}}")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, (bool, float)):
        raise ConfigError(f"{path}: zero_optimization.stage={short(stage)}; use 1, 2 or 3")
    if config.get("fp16", {}).get("enabled"):
        raise ConfigError(
            f"{path}: fp16 needs loss scaling, which is not supported; use bf16, or on GPUs "
            "without it (V100, T4) fp32: a copy of the ds_config zero2 or zero3 without its bf16 "
            "section"
        )
    if stage == 1 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise ConfigError(  # for it DeepSpeed has another optimizer, whose updates cannot be judged
            f"{path}: data_types.grad_accum_dtype=fp32 needs zero_optimization.stage 2 or 3"
        )
    for key in ("offload_param", "offload_optimizer"):
        part = config["zero_optimization"].get(key) or {}
        device = part.get("device", "none") if isinstance(part, dict) else part
        if device not in ("none", "cpu"):  # DeepSpeed 0.19 cannot load what it has put on NVMe
            raise ConfigError(
                f"{path}: zero_optimization.{key}.device={short(device)} is not supported, since "
                "such a run cannot be resumed from a checkpoint; use cpu, or remove it"
            )
    return config


@dataclass(frozen=True)
class Layout:
    """What decides memory and traffic: widths in bytes per number, buckets in numbers.

    Attributes:
        config: the JSON object itself.
        hpz: ranks that share a second copy of the parameters (ZeRO++); 1: there is none.
    """

    name: str
    config: dict[str, Any] = field(repr=False, hash=False)
    stage: int
    width: int  # of parameters and of what is reduced
    gradient_width: int  # of the gradients that are kept until the step
    master_width: int  # of the weights that the optimizer updates
    moment_width: int
    overlap: bool
    reduce_bucket: int
    prefetch: int
    persistent: int  # tensors of up to this many numbers are never partitioned
    reuse: int  # a gathered parameter is kept if it is used again within this many numbers
    sub_group: int
    offload_parameters: bool  # to the host
    offload_optimizer: bool
    hpz: int
    quantized_weights: bool
    quantized_gradients: bool

    @classmethod
    def of(cls, name: str, config: dict[str, Any]) -> Layout:
        """Read the keys of `config` (DeepSpeed 0.19, runtime/zero/config.py)."""
        zero = config["zero_optimization"]
        half = config.get("bf16", {})
        width = 2 if half.get("enabled") else 4
        gradients = config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            name=name,
            config=config,
            stage=zero["stage"],
            width=width,
            gradient_width=_WIDTH[gradients] or width,
            master_width=2 if half.get("bf16_master_weights_and_grads") else 4,
            moment_width=2 if half.get("bf16_optimizer_states") else 4,
            overlap=zero.get("overlap_comm", zero["stage"] == 3),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            offload_parameters=(zero.get("offload_param") or {}).get("device") == "cpu",
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device") == "cpu",
            hpz=int(zero.get("zero_hpz_partition_size", 1)),
            quantized_weights=bool(zero.get("zero_quantized_weights")),
            quantized_gradients=bool(zero.get("zero_quantized_gradients")),
        )

    @property
    def lossy(self) -> bool:
        """Whether communication is quantised, which changes the result of a step."""
        return self.quantized_weights or self.quantized_gradients

    @property
    def offloads(self) -> int:
        """How many of the two things that a layout may keep on the host are kept there."""
        return self.offload_optimizer + self.offload_parameters

    @property
    def precision(self) -> tuple[int, int, int, int, bool, bool]:
        """The settings that change numbers and not only where they are stored."""
        return (
            self.width,
            self.gradient_width,
            self.master_width,
            self.moment_width,
            self.quantized_weights,
            self.quantized_gradients,
        )

    def group(self, ranks: int) -> int:
        """Return how many of `ranks` share a second copy of the parameters (ZeRO++)."""
        return min(self.hpz, ranks)

    def by_layer(self, numbers: int) -> bool:
        """Return whether a decoder layer of `numbers` parameters is gathered as a whole.

        When a layer starts, DeepSpeed prefetches one bucket and no more, so training would wait for
        the rest of a larger layer. See training/deepspeed/leaf_layers.py.
        """
        return self.stage == 3 and numbers <= self.prefetch

    def unfit(self, ranks: int, gpus: bool) -> str | None:
        """Return why `ranks` ranks cannot use this layout, in one clause; None if they can."""
        if self.lossy and not gpus:
            return "quantised traffic needs GPUs (DeepSpeed 0.19 has no CPU kernels for it)"
        if ranks % self.group(ranks):
            return f"zero_hpz_partition_size={self.hpz} does not divide {ranks} ranks"
        return None
