"""A session: everything that training one stage on this rank needs, in one value.

`setup.open_session` opens the session of a real training. `build_session` makes one without
opening anything, for benchmarks and tests that take steps of their own.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lbr_ds.batching import TextTokenizer
from lbr_ds.config import RunConfig
from lbr_ds.config.ds_config import Layout
from lbr_ds.config.training import StageConfig
from lbr_ds.distributed import World
from lbr_ds.model.bottleneck import Card, load_tokenizer
from lbr_ds.model.embedder import Embedder, build_embedder
from lbr_ds.model.lora import adapting
from lbr_ds.system import environment
from lbr_ds.training.checkpoint.saver import Saver
from lbr_ds.training.deepspeed.compiling import compile_engine
from lbr_ds.training.deepspeed.engine import Engine, load_layout
from lbr_ds.training.deepspeed.weights import Origin
from lbr_ds.training.guard import Guard
from lbr_ds.training.held_out import HeldOutSample
from lbr_ds.training.kernels import attention_kernels
from lbr_ds.training.meter import Meter
from lbr_ds.training.preempt import Preemption
from lbr_ds.training.reduction import one_reduction
from lbr_ds.training.stages import STAGES, Stage
from lbr_ds.training.starts import starting_point
from lbr_ds.training.trackers import Trackers
from lbr_ds.training.watch import Watch
from lbr_ds.training.work import Work

log = logging.getLogger(__name__)


@dataclass
class Session:
    """One stage of one run in training, as this rank sees it.

    Attributes:
        run: The recipe.
        stage: How samples become work, and work gradients.
        world: This rank's place among all ranks.
        engine: The sharded model with its optimizer.
        guard: Decides whether an update is applied.
        watch: Ends the job when a rank dies or hangs.
        meter: Writes metrics.
        saver: Writes checkpoints.
        preemption: Notes signals.
        feed: This rank's work, step after step.
        num_steps: Number of optimizer steps of the whole stage.
        start: Steps that were done when the session began.
        step: Steps that are done now.
        held_out: Held-out texts for evaluation; None: no evaluation.
        unevaluated: Whether a signal prevented the evaluation that was due at `start`.
    """

    run: RunConfig
    stage: Stage
    world: World
    engine: Engine
    guard: Guard
    watch: Watch
    meter: Meter
    saver: Saver
    preemption: Preemption
    feed: Iterator[Work]
    num_steps: int
    start: int = 0
    held_out: HeldOutSample | None = None
    unevaluated: bool = False
    step: int = field(init=False)

    def __post_init__(self) -> None:
        """Begin at `start`."""
        self.step = self.start

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the prepared backbone, with the lengths of the recipe."""
        return text_tokenizer(self.run)

    @functools.cached_property
    def one_reduction(self) -> bool:
        """Whether a step of gradient caching reduces gradients once; see `reduction.py`."""
        return one_reduction(self)

    @property
    def splits(self) -> list[str]:
        """The split that the stage trains on, and that of the stage that it replays, if any."""
        return [STAGES[number].split for number in self.run.parts(self.stage.number)]

    @property
    def config(self) -> StageConfig:
        """The recipe's section of this stage."""
        return self.run.stage(self.stage.number)


def build_session(
    run: RunConfig,
    number: int,
    engine: Engine,
    watch: Watch | None = None,
    *,
    feed: Iterable[Work] = (),
    start: int = 0,
    num_steps: int | None = None,
) -> Session:
    """Build the session of stage `number` around an engine. Nothing is opened or written yet.

    Args:
        run: The recipe; the prepared backbone is in its run folder.
        number: 1 or 2.
        engine: See `build_engine`.
        watch: The watch that is running, if there is one.
        feed: This rank's work for the steps from `start` on.
        start: Steps done before.
        num_steps: Number of steps of the stage; None: the recipe's.
    """
    world, folder = engine.world, run.run / f"stage{number}"
    num_steps = run.stage(number).steps(0) if num_steps is None else num_steps
    return Session(
        run=run,
        stage=STAGES[number],
        world=world,
        engine=engine,
        guard=Guard(run.guard, folder, world),
        watch=watch or Watch(world, run.engine.timeout_minutes),
        meter=Meter(
            folder,
            start=start,
            stop=num_steps,
            every=run.every.log,
            world=world,
            trackers=Trackers(run, folder),
        ),
        saver=Saver(run, number, engine),
        preemption=Preemption(world),
        feed=iter(feed),
        num_steps=num_steps,
        start=start,
    )


def text_tokenizer(run: RunConfig) -> TextTokenizer:
    """Return the tokenizer of the prepared backbone, with the lengths of the recipe."""
    return TextTokenizer(
        load_tokenizer(run.run / "backbone"),
        ratio=run.bottleneck.ratio,
        max_length=run.model.max_length,
        num_bottleneck=run.bottleneck.count,
        pool_instruction=run.model.pool_instruction,
        chat=Card.load(run.run / "backbone").chat,
    )


def build_engine(
    run: RunConfig,
    number: int,
    world: World,
    *,
    layout: Layout | None = None,
    origin: Path | None = None,
) -> Engine:
    """Build the engine of stage `number` around the embedder. All ranks call it.

    Args:
        run: The recipe; the prepared backbone is in its run folder.
        number: 1 or 2.
        world: This rank's place.
        layout: The ds_config; None: the recipe's.
        origin: Checkpoint or folder whose weights are loaded; None: what the stage starts from.
    """
    layout = layout or load_layout(run.engine.ds_config)
    origin = origin or starting_point(run, number, world)
    weights = origin / "model" if (origin / "model").is_dir() else origin
    backbone = run.run / "backbone"
    warn_of_slow_bf16(run, layout, world)
    seed_all(run.seed)
    engine = Engine(
        embedder_maker(run),
        Origin(weights, spare=backbone if number == 2 else None),
        layout=layout,
        optim=run.stage(number).optim,
        world=world,
        adapt=adapting(run, backbone),
    )
    engine.engine.module.kernels = attention_kernels(run, engine.dtype, world)
    compile_engine(engine, run.model.compile)
    return engine


def warn_of_slow_bf16(run: RunConfig, layout: Layout, world: World) -> None:
    """Log a warning where this CPU has no instructions for the layout's dtype."""
    if layout.width == 2 and world.device.type == "cpu" and environment.cpu_lacks_bf16():
        log.warning(
            "engine.ds_config=%s: this CPU has no instructions for bf16 and takes several times as "
            "long as in fp32; use zero3_cpu",
            run.engine.ds_config,
        )


def embedder_maker(run: RunConfig) -> Callable[[torch.dtype], Embedder]:
    """Return `make(dtype)`, which builds the embedder as training uses it, without its weights."""
    return functools.partial(
        build_embedder,
        run.run / "backbone",
        activation_checkpointing=run.model.checkpoints_activations,
        trust_remote_code=run.model.trust_remote_code,
    )


def seed_all(seed: int) -> None:
    """Seed every random generator of this process, so that two runs end in equal states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
