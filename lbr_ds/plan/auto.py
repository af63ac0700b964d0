"""What `auto` means: the layout, the micro-batch and the checkpointing that take the least time.

    choice = choose(run, 1, shape, cluster)
    choice.ds_config, choice.micro_batch_tokens, choice.activation_checkpointing

A key of the recipe that is `auto` (engine.ds_config, model.activation_checkpointing,
stageN.micro_batch_tokens) is open; the others stay as they are. Of all combinations that fit into
the memory the one with the shortest predicted step is taken, with three rules for what the
prediction cannot tell apart: a layout that offloads only if no other fits; the lowest ZeRO stage
unless another layout is at least 10 % faster; and the smallest micro-batch that keeps the device
busy unless a larger one saves more than 2 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from lbr_ds.config import RunConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.config.ds_config import Layout
from lbr_ds.plan.fit import GIB, fill, memory_on, refusal, reserve
from lbr_ds.plan.gpus import Cluster
from lbr_ds.plan.shape import Shape
from lbr_ds.plan.speed import step_time
from lbr_ds.plan.work import work_of
from lbr_ds.system import resources

AUTO = "auto"
_GAIN = 0.02  # a larger micro-batch must save this share of the time
_SURE = 0.10  # and so must a higher ZeRO stage
_ENOUGH, _ENOUGH_CPU = 8192, 2048  # tokens of a forward with which products reach their full speed


class Cost(NamedTuple):
    """What a layout costs: parts on the host (`Layout.offloads`), ZeRO stage, planned seconds."""

    offloads: int
    zero_stage: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """Values for the three keys, and what the plan says of them.

    Attributes:
        ds_config: name of the layout.
        peak_gib: planned memory of a rank.
        seconds: planned time of a step.
        refusal: why it does not fit, where nothing does and this needs the least; None if it fits.
        halved: whether the micro-batch was halved because a device ran out of memory.
    """

    ds_config: str
    activation_checkpointing: bool
    micro_batch_tokens: int
    peak_gib: float = 0.0
    seconds: float = 0.0
    refusal: str | None = None
    halved: bool = False


def is_open(run: RunConfig, number: int) -> bool:
    """Return whether a key of the recipe is `auto`."""
    return AUTO in (
        run.engine.ds_config,
        run.model.activation_checkpointing,
        run.stage(number).micro_batch_tokens,
    )


def settled(run: RunConfig, number: int, choice: Choice) -> RunConfig:
    """Return the recipe with the values of `choice` for the keys that are `auto`."""
    engine, model, stage = run.engine, run.model, run.stage(number)
    if engine.ds_config == AUTO:
        engine = engine.model_copy(update={"ds_config": choice.ds_config})
    if model.activation_checkpointing == AUTO:
        on = choice.activation_checkpointing
        model = model.model_copy(update={"activation_checkpointing": on})
    if stage.micro_batch_tokens == AUTO:
        stage = stage.model_copy(update={"micro_batch_tokens": choice.micro_batch_tokens})
    changed = {"engine": engine, "model": model, f"stage{number}": stage}
    return run.model_copy(update=changed)


def choose(
    run: RunConfig,
    number: int,
    shape: Shape,
    cluster: Cluster,
    *,
    zero_stage: int | None = None,
    width: int | None = None,
) -> Choice:
    """Choose the values of a stage's open keys for a cluster.

    Args:
        run: the recipe.
        number: 1 or 2.
        shape: the backbone.
        cluster: the ranks; `cluster.gpu.memory_gib` is what each of them has.
        zero_stage: only layouts of this ZeRO stage, that of a checkpoint; None: all.
        width: only layouts with so many bytes per parameter; None: those for the device.

    Raises:
        ConfigError: the ranks cannot share a step, or a named layout cannot be read.
    """
    candidates = _layouts(run, cluster, width)
    kept = [layout for layout in candidates if zero_stage in (None, layout.stage)]
    found = [
        (layout, _fastest(list(_options(run, number, shape, cluster, layout)), cluster))
        for layout in kept or candidates
    ]
    fitting = [(layout, choice) for layout, choice in found if choice.refusal is None]
    if not fitting:
        return min((choice for _, choice in found), key=_need)
    costs = [Cost(layout.offloads, layout.stage, choice.seconds) for layout, choice in fitting]
    return fitting[cheapest(costs)][1]


def cheapest(costs: list[Cost]) -> int:
    """Return the index of the layout that is preferred among those that fit."""
    least = min(cost.offloads for cost in costs)
    most = min(cost.seconds for cost in costs if cost.offloads == least) * (1 + _SURE)

    def key(index: int) -> tuple[int, bool, int, float]:
        cost = costs[index]
        return (cost.offloads, cost.seconds > most, cost.zero_stage, cost.seconds)

    return min(range(len(costs)), key=key)


def _layouts(run: RunConfig, cluster: Cluster, width: int | None) -> list[Layout]:
    """Return the named layout, or the shipped ones that give exact results in this precision."""
    if run.engine.ds_config != AUTO:
        return [layouts.load(run.engine.ds_config)]
    names = sorted(p.stem for p in resources.shipped_folder("ds_configs").glob("*.json"))
    shipped = [layouts.load(name) for name in names]
    return [layout for layout in shipped if suits(layout, cluster, width)]


def suits(layout: Layout, cluster: Cluster, width: int | None = None) -> bool:
    """Return whether a layout gives exact results in a precision; None: the device's usual one."""
    return not layout.lossy and layout.width == (width or (4 if cluster.gpu.cpu else 2))


def _checkpointing(run: RunConfig) -> tuple[bool, ...]:
    given = run.model.activation_checkpointing
    return (False, True) if given == AUTO else (bool(given),)


def _options(
    run: RunConfig, number: int, shape: Shape, cluster: Cluster, layout: Layout
) -> Iterator[Choice]:
    """Yield the layout with and without checkpointing, with each size of the micro-batch."""
    stage = run.stage(number)
    for on, tokens in product(_checkpointing(run), _sizes(run, number, cluster.world)):
        part = stage.model_copy(update={"micro_batch_tokens": tokens})
        work = work_of(run.model_copy(update={f"stage{number}": part}), number, cluster.world)
        memory = memory_on(run, shape, layout, work, cluster, on)
        yield Choice(
            layout.name,
            on,
            tokens,
            (memory.peak + reserve(cluster.gpu)) / GIB,
            step_time(shape, layout, work, cluster, on).seconds,
            refusal(layout, memory, cluster),
        )


def _sizes(run: RunConfig, number: int, world: int) -> list[int]:
    """Return the sizes to try: a rank's whole step, and its halves down to one sequence."""
    stage = run.stage(number)
    if stage.micro_batch_tokens != AUTO:
        return [stage.micro_tokens]
    one = stage.model_copy(update={"micro_batch_tokens": 16})
    work = work_of(run.model_copy(update={f"stage{number}": one}), number, world)
    least = max(16, run.stage2.chunk_tokens or 0) if number == 2 else 16
    packed, sizes = work.sequences, list[int]()
    while packed:
        sizes.append(max(least, packed * work.length))
        packed = 0 if packed == 1 else -(-packed // 2)
    return list(dict.fromkeys(sizes))


def _need(choice: Choice) -> tuple[float, int]:
    return choice.peak_gib, choice.micro_batch_tokens


def _fastest(options: list[Choice], cluster: Cluster) -> Choice:
    """Return the fastest option that fits, with the smallest micro-batch that is as fast."""
    fitting = [option for option in options if option.refusal is None]
    if not fitting:
        return min(options, key=_need)
    most = min(option.seconds for option in fitting) * (1 + _GAIN)
    near = [option for option in fitting if option.seconds <= most]
    enough = _ENOUGH_CPU if cluster.gpu.cpu else _ENOUGH
    busy = [option for option in near if option.micro_batch_tokens >= enough]
    if busy:
        return min(busy, key=lambda option: (option.micro_batch_tokens, option.seconds))
    return max(near, key=lambda option: (option.micro_batch_tokens, -option.seconds))


def values(run: RunConfig, number: int, choice: Choice) -> str:
    """Return the keys that are `auto` with their values, as they would be given to a command."""
    found = []
    if run.engine.ds_config == AUTO:
        found.append(f"engine.ds_config={choice.ds_config}")
    if run.model.activation_checkpointing == AUTO:
        on = "true" if choice.activation_checkpointing else "false"
        found.append(f"model.activation_checkpointing={on}")
    if run.stage(number).micro_batch_tokens == AUTO:
        found.append(f"stage{number}.micro_batch_tokens={choice.micro_batch_tokens}")
    return " ".join(found)


def describe(run: RunConfig, number: int, choice: Choice, cluster: Cluster) -> str:
    """Return one line: the keys that are `auto` with their values, and why."""
    gpu, chosen = cluster.gpu, f"auto: {values(run, number, choice)}"
    if choice.refusal is not None:
        return f"{chosen}: nothing fits by the plan, and this needs the least ({choice.refusal})"
    return (
        f"{chosen}: the cheapest that fits, {choice.peak_gib:.3g} GiB planned of "
        f"{fill(gpu) * gpu.memory_gib:.3g} per rank ({fill(gpu):.0%} of {gpu.memory_gib:.4g})"
    )


def unplanned(*, gpu: bool, zero_stage: int = 3, width: int | None = None) -> Choice:
    """Return the values for a backbone that the plan does not know: those that need little memory.

    Args:
        gpu: whether the ranks have GPUs.
        zero_stage: of the checkpoint that is resumed.
        width: bytes of a parameter in it.
    """
    half = gpu if width is None else width == 2
    return Choice(f"zero{zero_stage}" if half else f"zero{zero_stage}_cpu", True, 8192)


def halved(choice: Choice) -> Choice:
    """Return the choice with half of its micro-batch, for a device that ran out of memory."""
    tokens = max(16, choice.micro_batch_tokens // 2)
    return replace(choice, micro_batch_tokens=tokens, halved=True)
