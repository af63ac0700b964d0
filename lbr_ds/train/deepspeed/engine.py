"""DeepSpeed behind six methods; the only file that imports it.

The engine builds the model sharded (under ZeRO-3 no rank ever holds it whole), runs forwards and
backwards, adds gradients up over micro-batches, steps, and saves. What it is told comes from two
places that may not overlap: the ds_config says how memory is laid out, the recipe says the rest.
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

from lbr_ds.config import OptimConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, ConfigError, EnvironmentProblem
from lbr_ds.model.embedder import Embedder
from lbr_ds.model.lora import parts
from lbr_ds.train.checkpoint.snapshot import HostMemory
from lbr_ds.train.deepspeed.extensions import wait_for_compiler
from lbr_ds.train.deepspeed.leaf_layers import by_layer
from lbr_ds.train.deepspeed.library import StateCollector, deepspeed, gathered, silenced
from lbr_ds.train.deepspeed.universal import mend, to_universal
from lbr_ds.train.deepspeed.weights import Origin, load_weights, shape_of
from lbr_ds.train.meter import free_memory
from lbr_ds.train.optim import parameter_groups

log = logging.getLogger(__name__)


def load_layout(name: str) -> layouts.Layout:
    """The ds_config by shipped name or path; `auto` is zero3, or zero3_cpu without a GPU.

    Raises ConfigError (see layout.read).
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
        """make(dtype) builds the module; its parameters are then read from the folder `weights`.

        adapt: freezes them and lays what learns over them (model/lora.py); None: all learn.
        """
        if reason := layout.unfit(world.size, gpus=world.device.type == "cuda"):
            raise ConfigError(f"engine.ds_config: {reason}; take zero3, or zero3_cpu on CPU ranks")
        self.world = world
        self._one_reduction: bool | None = None
        self.stage = layout.stage
        self.dtype = torch.bfloat16 if layout.width == 2 else torch.float32
        config = {
            **layout.config,
            "train_micro_batch_size_per_gpu": 1,  # micro-batches are cut by tokens, not by rows
            "gradient_accumulation_steps": 1,  # and their number differs: see backward(last=)
            "gradient_clipping": optim.clip,
            "steps_per_print": 1_000_000_000,
        }
        if layout.width == 2:  # ZeRO-1 and 2 would let a non-finite update through without it
            config["bf16"] = {**layout.config["bf16"], "check_grad_overflow": True}
        with self._sharded(config):
            model = make(self.dtype)
        if self.stage < 3:
            model.to(world.device)
        load_weights(model.backbone.named_parameters(), weights, world, gathered)
        self.adapted = adapt is not None
        if adapt is not None:
            adapt(model)  # outside of zero.Init, which would take the new parameters' values away
        self.num_parameters = sum(shape_of(p).numel() for p in model.parameters())
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        shapes = {n: tuple(shape_of(p)) for n, p in learning.items()}
        self.num_learning = sum(map(math.prod, shapes.values()))
        groups = parameter_groups(shapes, learning, optim)
        config["zero_optimization"] = by_layer(model.backbone, layout)
        with silenced():
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=_optimizer(groups, layout, optim), config=config
            )
        self._judge_norms()
        # DeepSpeed puts a script beside every checkpoint; rank 0 alone would fail on a full disk.
        self.engine._copy_recovery_script = lambda folder: None

    def _sharded(self, config: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Where the module is built: parameters are cut up as each submodule is made."""
        if self.stage < 3:
            return contextlib.nullcontext()
        # Not dtype=, which is bf16 on CPUs without fp16 whatever one says (DeepSpeed #8428).
        return deepspeed.zero.Init(config_dict_or_path=config)

    def __str__(self) -> str:
        whole, learning = self.num_parameters / 1e6, self.num_learning / 1e6
        return f"ZeRO stage {self.stage}, {whole:.1f}M parameters, {learning:.1f}M of them learn"

    def __call__(self, batch: Any) -> Tensor:
        """The module's forward. All ranks must call it equally often, in the same order."""
        return self.engine(batch)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Around forwards that nothing is learnt from: no graph, no dropout; then all as before."""
        learning = [module for module in self.engine.module.modules() if module.training]
        self.engine.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in learning:
                module.training = True

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
        need, free = self.num_learning * self.dtype.itemsize, free_memory(self.world)
        (lacking,) = self.world.max(float(need > free / 2))
        log.info(
            "gradient caching: %s (a whole gradient is %.2f GiB, %.1f GiB are free)",
            "a reduction each chunk" if lacking else "one reduction a step",
            need / 2**30,
            free / 2**30,
        )
        return not lacking

    def step(
        self, lr: float, accept: Callable[[float], bool] = math.isfinite
    ) -> tuple[float, bool]:
        """Clip, update, forget the gradients. Returns (gradient norm before clipping, applied).

        accept(norm) decides before anything changes, on numbers that are the same on all ranks.
        Where it says no, or the norm is not finite, parameters and optimizer stay as they were.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._accept, self._norm = accept, math.nan
        self.engine.step()
        return self._norm, self.engine.was_step_applied()

    def _judge_norms(self) -> None:
        """Put `accept` where DeepSpeed 0.19 asks for the norm.

        Its optimizers (stage3.py, stage_1_and_2.py: step) leave an update out on all ranks, and
        forget the gradients, when the norm is infinite; so that is what a refused one becomes.
        ZeRO-1 and 2 look at the gradients first and never ask when those are not finite.
        """
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        ask = getattr(self.optimizer, name)

        def judged() -> Any:
            found = ask()
            parts = [float(n) for n in (found if self.stage == 3 else [found])]
            # -1 stands for a norm that is not finite.
            self._norm = math.nan if min(parts) < 0 else math.hypot(*parts)
            if math.isfinite(self._norm) and self._accept(self._norm):
                return found
            refused = torch.full((), math.inf, device=self.world.device)
            return [refused] if self.stage == 3 else refused

        setattr(self.optimizer, name, judged)

    def snapshot(self, memory: HostMemory | None) -> dict[str, Any]:
        """This rank's share of what learns, optimizer and counts: file name -> what to torch.save.

        With `memory` it is a copy as of now, on the host; without, the tensors live on and must
        be written before the next step. The files lie as DeepSpeed's own. All ranks call it.
        """
        collector = StateCollector(memory)
        self.engine.checkpoint_engine = collector
        with silenced():
            self.engine.save_checkpoint(
                "state", tag="ranks", save_latest=False, exclude_frozen_parameters=True
            )
        return collector.files

    def load_state(self, folder: Path) -> None:
        """Take over what `snapshot` gave on as many ranks, and `base`. Raises CheckpointError."""
        self._load(folder, "ranks")
        self._load_base(folder)

    def load_reshaped(self, folder: Path, scratch: Path) -> None:
        """As `load_state`, from any number of ranks, by way of DeepSpeed's universal format.

        Rank 0 makes `scratch` (24 bytes a parameter, half of it for a moment) on a file system that
        all ranks see, and removes it. Random states are none of DeepSpeed's business.
        """
        failure = to_universal(folder / "ranks", scratch / "all") if self.world.first else ""
        if failure := self.world.share(failure):
            raise CheckpointError(f"{folder}: cannot be laid out for other ranks: {failure}")
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        self.engine._config.load_universal_checkpoint = True
        self._load(scratch, "all")
        self.engine._config.load_universal_checkpoint = False
        mend(self.optimizer, groups, self.world.device)
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
        """What lies frozen below adapters: DeepSpeed's universal format leaves it out."""
        if self.adapted:
            below = ((name, own[0]) for name, own, _ in parts(self.engine.module))
            load_weights(below, folder / "base", self.world, gathered)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole gradient) of what learns one by one, after the last backward before `step`.

        All ranks iterate; each gets the average over ranks, in fp32.
        """
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                whole = deepspeed.utils.safe_get_full_grad(parameter)
                yield name.removeprefix("backbone."), whole

    def weights(self, mine: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) of those in `mine`, one by one. All ranks iterate.

        Names are the backbone's own, as `from_pretrained` wants them; adapters are merged.
        """
        for name, own, make in parts(self.engine.module):
            with gathered(*own):
                if name in mine:
                    yield name, make().to("cpu", copy=True)

    def base(self, mine: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """As `weights`, but what lies frozen below adapters; nothing where all weights learn."""
        for name, own, _ in parts(self.engine.module) if self.adapted else ():
            with gathered(own[0]):
                if name in mine:
                    yield name, own[0].detach().to("cpu", copy=True)

    def sizes(self) -> dict[str, int]:
        """Name: bytes of each of `weights`, whole."""
        found = parts(self.engine.module)
        return {name: shape_of(own[0]).numel() * own[0].itemsize for name, own, _ in found}


def _optimizer(
    groups: list[dict[str, Any]], layout: layouts.Layout, optim: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW: torch's own, fused (a sixth of the time, on a CPU too), or DeepSpeed's for offload."""
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if layout.offload_optimizer:
        wait_for_compiler("cpu_adam")
        try:
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        except Exception as error:  # of many kinds: it is compiled at its first use
            why = str(error).splitlines()[0]
            raise EnvironmentProblem(f"offload_optimizer needs g++ and ninja: {why}") from None
    return torch.optim.AdamW(groups, fused=True, **options)
