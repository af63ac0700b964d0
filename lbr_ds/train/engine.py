"""DeepSpeed behind six methods; the only file that imports it.

The engine builds the model sharded (under ZeRO-3 no rank ever holds it whole), runs forwards and
backwards, adds gradients up over micro-batches, steps, and saves. What it is told comes from two
places that may not overlap: the ds_config says how memory is laid out, the recipe says the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lbr_ds import layout
from lbr_ds.config import OptimConfig
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.model.embedder import Embedder
from lbr_ds.train.optim import parameter_groups

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed

for name in ("DeepSpeed", "deepspeed"):
    logging.getLogger(name).setLevel(logging.WARNING)
# On CPU ranks DeepSpeed would compile a shared-memory all-reduce that only its inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_ds_config(name: str) -> dict[str, Any]:
    """The ds_config by shipped name or path; `auto` is zero3, or zero3_cpu without a GPU.

    Raises ConfigError (see layout.read).
    """
    if name == "auto":
        name = "zero3" if torch.cuda.is_available() else "zero3_cpu"
    return layout.read(name)


class Engine:
    """A sharded model with its optimizer."""

    def __init__(
        self, make: Callable[[torch.dtype], Embedder], weights: Path, *,
        ds_config: dict[str, Any], optim: OptimConfig, world: World,
    ) -> None:  # fmt: skip
        """make(dtype) builds the module; its parameters are then read from the folder `weights`."""
        self.world = world
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
                model=model, optimizer=_optimizer(groups, ds_config, optim, world), config=config
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

    def weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole tensor on the CPU) one by one on rank 0; None elsewhere. All ranks iterate.

        Names are the backbone's own, as `from_pretrained` wants them.
        """
        for name, parameter in self.engine.module.backbone.named_parameters():
            with gathered(parameter):
                whole = parameter.detach().to("cpu", copy=True) if self.world.first else None
            yield name, whole


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
    groups: list[dict[str, Any]], ds_config: dict[str, Any], optim: OptimConfig, world: World
) -> torch.optim.Optimizer:
    """AdamW: torch's own (fused on a GPU), or DeepSpeed's for states that live on the CPU."""
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=world.device.type == "cuda", **options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints to stdout whatever the log level; our stdout is for results."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
