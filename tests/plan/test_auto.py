"""What `auto` chooses, on both sides of every boundary of memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from lbr_ds.config import RunConfig, load
from lbr_ds.errors import ConfigError
from lbr_ds.plan import Cluster, auto, find_gpu
from lbr_ds.plan.fit import fill
from lbr_ds.plan.shape import shape_of

NAMED = [
    "model.activation_checkpointing=true",
    "stage1.micro_batch_tokens=2048",
    "stage2.micro_batch_tokens=2048",
]
GPU_LAYOUTS = ("zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_params")
HAIR = 1e-6  # share of the memory


def cluster(run: RunConfig, gib: float | None = None, device: str = "h100") -> Cluster:
    gpu = find_gpu(device)
    changes = {"host_memory_gib": 1e6, **({"memory_gib": gib} if gib else {})}
    return Cluster(1, 8, gpu.model_copy(update=changes))


def chosen(run: RunConfig, gib: float, device: str = "h100", number: int = 1) -> auto.Choice:
    return auto.choose(run, number, shape_of(run), cluster(run, gib, device))


def boundaries(run: RunConfig, device: str, layouts: tuple[str, ...]) -> dict[str, auto.Choice]:
    """Each layout's plan where memory does not matter."""
    plans = {}
    for name in layouts:
        engine = run.engine.model_copy(update={"ds_config": name})
        plans[name] = chosen(run.model_copy(update={"engine": engine}), 1e6, device)
    return plans


def budgets(plans: dict[str, auto.Choice], device: str) -> Iterator[float]:
    """Memory a hair above and a hair below what each layout needs."""
    for plan in plans.values():
        for factor in (1 + HAIR, 1 - HAIR):
            yield plan.peak_gib / fill(find_gpu(device)) * factor


@pytest.mark.parametrize(
    ("device", "layouts"), [("h100", GPU_LAYOUTS), ("cpu", ("zero1_cpu", "zero3_cpu"))]
)
def test_the_layout_changes_where_its_memory_ends(device: str, layouts: tuple[str, ...]) -> None:
    """7B on eight ranks: zero1 where it fits, offloading last, and always one that fits."""
    run, seen = load("huatuo-7b", ["engine.ds_config=auto", *NAMED]), set()
    plans = boundaries(run, device, layouts)
    for gib in budgets(plans, device):
        choice = chosen(run, gib, device)
        fits = [n for n, p in plans.items() if p.peak_gib <= gib * fill(find_gpu(device))]
        seen.add(choice.ds_config)
        if not fits:
            assert choice.refusal is not None
            assert choice.ds_config == min(layouts, key=lambda n: plans[n].peak_gib)
        elif layouts[0] in fits:
            assert choice.ds_config == layouts[0]
        else:
            assert choice.ds_config in fits
            staying = [n for n in fits if "offload" not in n]
            best = min(plans[n].seconds for n in staying or fits)
            assert not staying or choice.ds_config in staying
            assert plans[choice.ds_config].seconds <= 1.1 * best
    assert {layouts[0], layouts[-1], "zero3" if device == "h100" else "zero3_cpu"} <= seen


@pytest.mark.parametrize("number", [1, 2])
def test_the_micro_batch_is_the_largest_that_fits_and_pays(number: int) -> None:
    """A rank's whole step where it fits; a hair less memory, and it is halved."""
    keys = [f"stage{number}.samples_per_step=32", "engine.ds_config=zero3"]
    keys += ["model.activation_checkpointing=false", f"stage{number}.micro_batch_tokens=auto"]
    run = load("huatuo-7b", [*NAMED, *keys])
    whole, sizes = chosen(run, 1e6, number=number), []
    assert whole.micro_batch_tokens <= 8192  # so much is always taken where it fits
    gib = whole.peak_gib / fill(find_gpu("h100"))
    choice = chosen(run, gib * (1 + HAIR), number=number)
    assert choice == whole
    while choice.refusal is None:
        sizes.append(choice.micro_batch_tokens)
        gib = choice.peak_gib / fill(find_gpu("h100"))
        assert chosen(run, gib * (1 + HAIR), number=number) == choice
        choice = chosen(run, gib * (1 - HAIR), number=number)
    length = run.model.max_length + (run.stage1.max_target_length if number == 1 else 0)
    samples = 4 * (1 if number == 1 else 2 + run.stage2.num_negatives)
    assert sizes[0] == samples * length
    # Halves in whole sequences, until something else than activations decides the peak.
    assert len(sizes) > 1
    for larger, smaller in pairwise(sizes):
        assert smaller == -(-(larger // length) // 2) * length


def test_a_larger_micro_batch_than_keeps_the_device_busy_is_not_taken() -> None:
    run = load("chemistry-1.5b", ["stage1.micro_batch_tokens=auto", "engine.ds_config=zero1"])
    choice = chosen(run, 1e6)
    assert choice.micro_batch_tokens == 8192
    large = run.model_copy(
        update={"stage1": run.stage1.model_copy(update={"micro_batch_tokens": 65536})}
    )
    assert chosen(large, 1e6).seconds > 0.98 * choice.seconds


def test_activations_are_recomputed_only_where_they_do_not_fit() -> None:
    keys = ["engine.ds_config=zero3", *NAMED, "model.activation_checkpointing=auto"]
    run = load("huatuo-7b", keys)
    free = chosen(run, 1e6)
    assert free.activation_checkpointing is False
    need = free.peak_gib / fill(find_gpu("h100"))
    assert chosen(run, need * (1 + HAIR)).activation_checkpointing is False
    less = chosen(run, need * (1 - HAIR))
    assert (less.activation_checkpointing, less.refusal) == (True, None)


def test_named_values_stay() -> None:
    run = load("huatuo-7b", [*NAMED, "engine.ds_config=zero3"])
    assert not auto.is_open(run, 1)
    choice = auto.Choice("zero1", False, 64)
    assert auto.settled(run, 1, choice) == run
    opened = load("huatuo-7b", [*NAMED, "engine.ds_config=auto", "stage2.micro_batch_tokens=auto"])
    settled = auto.settled(opened, 2, choice)
    assert settled.engine.ds_config == "zero1"
    assert settled.stage2.micro_tokens == 64
    assert settled.stage1 == opened.stage1
    assert settled.model == opened.model
    with pytest.raises(ConfigError, match="give a number"):
        _ = opened.stage2.micro_tokens


def test_a_checkpoint_keeps_its_zero_stage_and_precision() -> None:
    """Such as that of a run that began under zero2 by name: zero1 would be cheaper."""
    run = load("huatuo-7b", ["engine.ds_config=auto", *NAMED])
    assert auto.choose(run, 1, shape_of(run), cluster(run, 1e6)).ds_config == "zero1"
    kept = auto.choose(run, 1, shape_of(run), cluster(run, 1e6), zero_stage=2, width=2)
    assert kept.ds_config == "zero2"
