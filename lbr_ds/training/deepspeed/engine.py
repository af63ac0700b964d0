"""A sharded model with its optimizer, on DeepSpeed.

The engine builds the model in shards (under ZeRO-3 no rank ever holds it whole), runs forward and
backward passes, accumulates gradients over micro-batches, updates, and gives out its state for
checkpoints. Its settings come from two places that do not overlap: the ds_config sets the memory
layout and the precision, the recipe sets everything else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch
from lbr_ds.config import OptimConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.model.embedder import Embedder
from lbr_ds.model.lora import parts
from lbr_ds.training.checkpoint.snapshot import HostMemory
from lbr_ds.training.deepspeed.flat_gradients import FlatGradients, fits
from lbr_ds.training.deepspeed.judge import Accept, Judge
from lbr_ds.training.deepspeed.leaf_layers import by_layer
from lbr_ds.training.deepspeed.lean_zero3 import make_lean, use_sharded_linear
from lbr_ds.training.deepspeed.library import StateCollector, deepspeed, gathered, silenced
from lbr_ds.training.deepspeed.settings import ds_config, optimizer
from lbr_ds.training.deepspeed.universal import repair_loaded, to_universal
from lbr_ds.training.deepspeed.weights import Origin, load_weights, shape_of
from lbr_ds.training.optim import parameter_groups

log = logging.getLogger(__name__)


def load_layout(name: str) -> layouts.Layout:
    """Load a ds_config by shipped name or path.

    `auto` is zero3, or zero3_cpu without a GPU; in training, `training/auto.py` settles it before.

    Raises:
        ConfigError: It cannot be read or used (see config/ds_config.py).
    """
    return layouts.load(layouts.resolve_name(name, gpu=torch.cuda.is_available()))


class Engine:
    """A sharded model with its optimizer."""

    def __init__(
        self,
        make: Callable[[torch.dtype], Embedder],
        weights: Path | Origin,
        *,
        layout: layouts.Layout,
        optim: OptimConfig,
        world: World,
        adapt: Callable[[Embedder], None] | None = None,
    ) -> None:
        """Build the module, load its weights, and wrap it in DeepSpeed's engine.

        Args:
            make: `make(dtype)` builds the module without weights.
            weights: Folder of the weights.
            layout: The ds_config.
            optim: Settings of the optimizer.
            world: This rank's place.
            adapt: Freezes the weights and adds adapters (model/lora.py); None: all are trained.
        """
        if reason := layout.unfit(world.size, gpus=world.device.type == "cuda"):
            raise ConfigError(f"engine.ds_config: {reason}; use zero3, or zero3_cpu on CPU ranks")
        self.world = world
        self.stage = layout.stage
        self.dtype = torch.bfloat16 if layout.width == 2 else torch.float32
        config = ds_config(layout, optim)
        with self._sharded(config):
            model = make(self.dtype)
        if self.stage < 3:
            model.to(world.device)
        load_weights(model.backbone.named_parameters(), weights, world, gathered)
        self.adapted = adapt is not None
        if adapt is not None:
            adapt(model)  # outside of zero.Init, which would take the new parameters' values away
        if self.stage == 3:
            use_sharded_linear(model)
        self.num_parameters = sum(shape_of(p).numel() for p in model.parameters())
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        shapes = {n: tuple(shape_of(p)) for n, p in trainable.items()}
        self.num_trainable = sum(map(math.prod, shapes.values()))
        groups = parameter_groups(shapes, trainable, optim)
        config["zero_optimization"] = by_layer(model.backbone, layout, config["zero_optimization"])
        with silenced():
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer(groups, layout, optim), config=config
            )
        flat = None
        if self.stage == 3:
            make_lean(model, self.optimizer, layout.hpz)
        elif fits(self.optimizer):
            flat = FlatGradients(self.optimizer, world)
        self._judge = Judge(self.optimizer, self.stage, world, optim.clip, flat)
        # DeepSpeed adds a script to every checkpoint; rank 0 alone would fail on a full disk.
        self.engine._copy_recovery_script = lambda folder: None

    def _sharded(self, config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which parameters are sharded as each submodule is made."""
        if self.stage < 3:
            return contextlib.nullcontext()
        # Not dtype=, which is bf16 on CPUs without fp16 whatever is given (DeepSpeed #8428).
        return deepspeed.zero.Init(config_dict_or_path=config)

    def __str__(self) -> str:
        whole, trainable = self.num_parameters / 1e6, self.num_trainable / 1e6
        return f"ZeRO stage {self.stage}, {whole:.1f}M parameters, {trainable:.1f}M trainable"

    @property
    def forward(self) -> Callable[[PackedBatch], Tensor]:
        """The module's forward. All ranks must call it equally often, in the same order."""
        return self.engine

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Run without graphs and dropout, for an evaluation; restore the mode afterwards."""
        training = [module for module in self.engine.module.modules() if module.training]
        self.engine.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of `loss`, a scalar, averaged over the ranks.

        Args:
            loss: The loss of a micro-batch.
            last: Whether it is the step's last micro-batch.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    @contextlib.contextmanager
    def coalesced_reduction(self) -> Iterator[None]:
        """Reduce gradients once, after all backward passes of a step of gradient caching.

        Every rank needs room for a whole gradient. Otherwise gradients are reduced after every
        chunk, and the sums are the same except for rounding.
        """
        # DeepSpeed restores at the end the boundary that it found here, and step() needs it set.
        self.engine.set_gradient_accumulation_boundary(True)
        with self.engine.coalesce_grad_reduction():
            yield

    def close(self) -> None:
        """Free the memory of the engine, which cannot be used afterwards. All ranks call it."""
        self.engine.destroy()

    def step(
        self,
        lr: float,
        accept: Accept = lambda norm, sums: True,
        sums: Tensor | None = None,
    ) -> tuple[float, bool]:
        """Clip the gradients, update the weights, and clear the gradients.

        Args:
            lr: The learning rate.
            accept: `accept(norm, sums)` decides whether the update is applied, from values that are
                equal on all ranks. Where it returns False, or the norm is not finite, parameters
                and optimizer state stay as they were.
            sums: (n,) float64 on the device, to be summed over the ranks for `accept`. They are
                reduced and read together with the norm, since a read makes the host wait for the
                device.

        Returns:
            The gradient norm before clipping, and whether the update was applied.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._judge.prepare(accept, sums)
        self.engine.step()
        return self._judge.norm, self.engine.was_step_applied()

    def snapshot(self, memory: HostMemory | None) -> dict[str, Any]:
        """Return this rank's part of trainable weights, optimizer and counters. All ranks call it.

        Args:
            memory: Host memory to copy the state to; None: the tensors are the live ones and must
                be written before the next step.

        Returns:
            File name (as DeepSpeed's own) -> object for torch.save.
        """
        collector = StateCollector(memory)
        self.engine.checkpoint_engine = collector
        with silenced():
            self.engine.save_checkpoint(
                "state", tag="ranks", save_latest=False, exclude_frozen_parameters=True
            )
        return collector.files

    def load_state(self, folder: Path) -> None:
        """Load what `snapshot` and `base` gave on the same number of ranks.

        Raises:
            CheckpointError: The state cannot be loaded.
        """
        self._load(folder, "ranks")
        self._load_base(folder)

    def load_reshaped(self, folder: Path, scratch: Path) -> None:
        """Load the state of another number of ranks, through DeepSpeed's universal format.

        Random states are not part of it.

        Args:
            folder: As for `load_state`.
            scratch: A folder on a file system that all ranks share; rank 0 makes and removes it. It
                takes 24 bytes per parameter, half of them only briefly.

        Raises:
            CheckpointError: The state cannot be converted or loaded.
        """
        failure = to_universal(folder / "ranks", scratch / "all") if self.world.first else ""
        if failure := self.world.share(failure):
            raise CheckpointError(f"{folder}: cannot be converted for other ranks: {failure}")
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.engine._config.load_universal_checkpoint = True
        self._load(scratch, "all")
        self.engine._config.load_universal_checkpoint = False
        repair_loaded(self.optimizer, groups, self.world.device)
        self._load_base(folder)
        self.world.barrier()
        if self.world.first:
            shutil.rmtree(scratch, ignore_errors=True)

    def _load(self, folder: Path, tag: str) -> None:
        self.engine.checkpoint_engine = StateCollector(None)
        try:
            with silenced():
                path, _ = self.engine.load_checkpoint(
                    str(folder), tag=tag, load_module_strict=not self.adapted
                )
        except Exception as error:  # DeepSpeed raises bare exceptions of many kinds here
            raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
        if path is None:
            raise CheckpointError(f"{folder}: holds no state for {self.world.size} ranks")

    def _load_base(self, folder: Path) -> None:
        """Load the frozen weights under adapters: DeepSpeed's universal format omits them."""
        if self.adapted:
            frozen = ((name, own[0]) for name, own, _ in parts(self.engine.module))
            load_weights(frozen, folder / "base", self.world, gathered)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole gradient) of every trainable parameter, after the last backward.

        All ranks iterate; each gets the average over the ranks, in fp32.
        """
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                whole = deepspeed.utils.safe_get_full_grad(parameter)
                yield name.removeprefix("backbone."), whole

    def weights(self, mine: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor on the CPU) of the weights in `mine`. All ranks iterate.

        Names are the backbone's own, as `from_pretrained` needs them; adapters are merged.
        """
        for name, own, make in parts(self.engine.module):
            with gathered(*own):
                if name in mine:
                    yield name, make().to("cpu", copy=True)

    def base(self, mine: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the frozen weights under adapters, as `weights`; none where all are trained."""
        for name, own, _ in parts(self.engine.module) if self.adapted else ():
            with gathered(own[0]):
                if name in mine:
                    yield name, own[0].detach().to("cpu", copy=True)

    def sizes(self) -> dict[str, int]:
        """Return the size of each of `weights` in bytes, by name."""
        return {
            name: shape_of(own[0]).numel() * own[0].itemsize
            for name, own, _ in parts(self.engine.module)
        }
