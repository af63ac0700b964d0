"""DeepSpeed behind six methods; the only file that imports it.

The engine builds the model sharded (under ZeRO-3 no rank ever holds it whole), runs forwards and
backwards, adds gradients up over micro-batches, steps, and saves. What it is told comes from two
places that may not overlap: the ds_config says how memory is laid out, the recipe says the rest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lbr_ds import resources
from lbr_ds.config import OptimConfig
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.model.embedder import Embedder
from lbr_ds.train.optim import parameter_groups

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed

OWNED_BY_RECIPE = {
    "train_batch_size": "stageN.samples_per_step",
    "train_micro_batch_size_per_gpu": "stageN.micro_batch_tokens",
    "gradient_accumulation_steps": "stageN.micro_batch_tokens",
    "gradient_clipping": "stageN.optim.clip",
    "optimizer": "stageN.optim",
    "scheduler": "stageN.optim",
    "activation_checkpointing": "model.activation_checkpointing",
}

log = logging.getLogger(__name__)

for name in ("DeepSpeed", "deepspeed"):
    logging.getLogger(name).setLevel(logging.WARNING)
# On CPU ranks DeepSpeed would compile a shared-memory all-reduce that only its inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_ds_config(name: str) -> dict[str, Any]:
    """The ds_config by shipped name or path; `auto` is zero3, or zero3_cpu without a GPU.

    Raises ConfigError when it is no JSON object, names no ZeRO stage of 1 to 3, or names a key that
    the recipe owns.
    """
    if name == "auto":
        name = "zero3" if torch.cuda.is_available() else "zero3_cpu"
    path = resources.find("ds_configs", name, ".json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a ds_config is a JSON object, not {type(config).__name__}")
    for key, owner in OWNED_BY_RECIPE.items():
        if key in config:
            raise ConfigError(f"{path}: {key} belongs to the recipe; remove it and set {owner}")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage={stage!r}; use 1, 2 or 3")
    if config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path}: fp16 needs loss scaling, which is not done here; use bf16")
    return config


class Engine:
    """A sharded model with its optimizer."""

    def __init__(
        self, make: Callable[[torch.dtype], Embedder], weights: Path, *,
        ds_config: dict[str, Any], optim: OptimConfig, world: World,
    ) -> None:  # fmt: skip
        """make(dtype) builds the module; its parameters are then read from the folder `weights`."""
        self.world = world
        self._one_reduction: bool | None = None
        self.stage: int = ds_config["zero_optimization"]["stage"]
        bf16 = bool(ds_config.get("bf16", {}).get("enabled"))
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        config = {
            **ds_config,
            "train_micro_batch_size_per_gpu": 1,  # micro-batches are cut by tokens, not by rows
            "gradient_accumulation_steps": 1,  # and their number differs: see backward(last=)
            "gradient_clipping": optim.clip,
            "steps_per_print": 1_000_000_000,
        }
        with self._sharded(config):
            model = make(self.dtype)
        if self.stage < 3:
            model.to(world.device)
        load_weights(model.backbone, weights, world)
        parameters = dict(model.named_parameters())
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in parameters.items()}
        self.num_parameters = sum(torch.Size(s).numel() for s in shapes.values())
        groups = parameter_groups(shapes, parameters, optim)
        with _quiet():
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=_optimizer(groups, ds_config, optim), config=config
            )

    def _sharded(self, config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Where the module is built: parameters are cut up as each submodule is made."""
        if self.stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.Init(config_dict_or_path=config, dtype=self.dtype)

    def __call__(self, batch: Any) -> Tensor:
        """The module's forward. All ranks must call it equally often, in the same order."""
        return self.engine(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a scalar's gradients up, averaged over ranks. last: the step's last micro-batch."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    @contextlib.contextmanager
    def cached_backwards(self) -> Iterator[None]:
        """Around all backwards of a step that gradient caching has cut into chunks.

        One reduction over ranks at the end instead of one a chunk, where every rank has room for a
        whole gradient; the sums are the same. Decided at the first such step: the rehearsal has
        then taken the memory that a step needs, so what is free is free.
        """
        if self._one_reduction is None:
            self._one_reduction = self._fits_whole_gradient()
        if not self._one_reduction:
            yield
            return
        # DeepSpeed puts back at the end the boundary that it found here, and step() asks for it.
        self.engine.set_gradient_accumulation_boundary(True)
        with self.engine.coalesce_grad_reduction():
            yield

    def _fits_whole_gradient(self) -> bool:
        """Whether a gradient that is not sharded takes at most half of what is free on any rank."""
        need = self.num_parameters * self.dtype.itemsize
        free = free_memory(self.world)
        (lacking,) = self.world.max(float(need > free / 2))
        log.info(
            "gradient caching: %s (a whole gradient is %.2f GiB, %.1f GiB are free)",
            "a reduction each chunk" if lacking else "one reduction a step",
            need / 2**30, free / 2**30,
        )  # fmt: skip
        return not lacking

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, update, forget the gradients. Returns (gradient norm before clipping, applied).

        Not applied: the norm was not finite, and DeepSpeed left the parameters as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm), self.engine.was_step_applied()

    def save_state(self, folder: Path, mine: dict[str, Any]) -> None:
        """Everything that a resume needs; `mine` is this rank's own. All ranks call it."""
        with _quiet():
            self.engine.save_checkpoint(
                str(folder / "state"), tag="ranks", client_state={"mine": mine}, save_latest=False
            )

    def load_state(self, folder: Path) -> dict[str, Any]:
        """Undo `save_state`; returns this rank's `mine`. Raises CheckpointError."""
        try:
            with _quiet():
                path, client = self.engine.load_checkpoint(str(folder / "state"), tag="ranks")
        except Exception as error:  # DeepSpeed raises bare exceptions of many kinds here
            raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
        if path is None:
            raise CheckpointError(f"{folder}: holds no state for {self.world.size} ranks")
        return client["mine"]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole gradient) one by one, after the last backward and before `step`.

        All ranks iterate; each gets the average over ranks, in fp32.
        """
        for name, parameter in self.engine.module.backbone.named_parameters():
            yield name, deepspeed.utils.safe_get_full_grad(parameter)

    def weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole tensor on the CPU) one by one on rank 0; None elsewhere. All ranks iterate.

        Names are the backbone's own, as `from_pretrained` wants them.
        """
        for name, parameter in self.engine.module.backbone.named_parameters():
            with gathered(parameter):
                whole = parameter.detach().to("cpu", copy=True) if self.world.first else None
            yield name, whole


def free_memory(world: World) -> float:
    """Bytes that a rank may still take: of its GPU, or its share of the host's."""
    if world.device.type == "cuda":
        return float(torch.cuda.mem_get_info(world.device)[0])
    return psutil.virtual_memory().available / world.size


def gathered(parameter: nn.Parameter, *, writer: int | None = None) -> Any:
    """A context in which a sharded parameter is whole; what rank `writer` writes stays."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer)


def load_weights(backbone: nn.Module, folder: Path, world: World) -> None:
    """Fill a (sharded) backbone from a folder's safetensors, one tensor at a time.

    Under ZeRO-3 rank 0 reads and the others receive their parts. Raises CheckpointError when a
    parameter has no tensor of its name and shape.
    """
    where = {key: file for file in sorted(folder.glob("*.safetensors")) for key in _keys(file)}
    for name, parameter in backbone.named_parameters():
        if name not in where:
            raise CheckpointError(f"{folder}: no tensor {name} in its safetensors files")
        sharded = hasattr(parameter, "ds_id")
        with gathered(parameter, writer=0), torch.no_grad():
            if sharded and not world.first:
                continue
            with safe_open(where[name], "pt") as file:
                tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                found, want = tuple(tensor.shape), tuple(parameter.shape)
                raise CheckpointError(f"{folder}: {name} has shape {found}, the model wants {want}")
            parameter.copy_(tensor)


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _optimizer(
    groups: list[dict[str, Any]], ds_config: dict[str, Any], optim: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW: torch's own, fused (a sixth of the time, on a CPU too), or DeepSpeed's for offload."""
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints to stdout whatever the log level; our stdout is for results."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
