"""The suites and their rows with targets; importing this takes no time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from lbr_ds.bench.measure import Target
from lbr_ds.errors import ConfigError

# What one H100 must reach, and the aim.
GPU = (
    Target(
        "mfu_stage1_0.5b",
        0.35,
        0.45,
        "higher",
        "MFU of a training step of stage 1, Qwen2.5-0.5B",
        seconds=90,
    ),
    Target(
        "mfu_stage2_0.5b",
        0.35,
        0.45,
        "higher",
        "MFU of a training step of stage 2, Qwen2.5-0.5B",
        seconds=60,
    ),
    Target(
        "zero3_over_torch",
        1.15,
        1.05,
        "lower",
        "a ZeRO-3 step over the same in plain torch, Qwen2.5-0.5B",
        seconds=60,
    ),
    Target(
        "ib_sft_over_sft_2048",
        1.00,
        0.97,
        "lower",
        "IB-SFT over plain SFT, X and Y of 2,048 tokens",
        seconds=60,
    ),
    Target(
        "reconstruct_over_pt_2048",
        2.0,
        1.9,
        "lower",
        "reconstruction over plain language modelling of 2,048 tokens",
        seconds=40,
    ),
    Target(
        "mfu_stage1_1.5b",
        0.40,
        0.50,
        "higher",
        "MFU of a training step of stage 1, Qwen2.5-1.5B",
        seconds=120,
    ),
    Target(
        "mfu_stage2_1.5b",
        0.40,
        0.50,
        "higher",
        "MFU of a training step of stage 2, Qwen2.5-1.5B",
        seconds=75,
    ),
    Target(
        "attention_dense_over_ib_16k",
        5.0,
        8.0,
        "higher",
        "attention with a dense mask over segments, 16k tokens",
        seconds=30,
    ),
    Target(
        "infonce_batch_1gib",
        65_536,
        131_072,
        "higher",
        "largest InfoNCE batch within 1 GiB",
        "queries",
        30,
    ),
    Target(
        "train_tokens_per_second",
        216_000,
        288_000,
        "higher",
        "`lbr-ds train` on prepared data, stage 1 of SmolLM2-135M",
        "tokens/s",
        150,
    ),
)
LOADER = (
    Target(
        "loader_over_webdataset",
        4.0,
        6.0,
        "higher",
        "samples/s of the data stream over plain webdataset",
    ),
    Target(
        "seek_far_over_near",
        1.2,
        1.1,
        "lower",
        "the first step at sample 10^6 over that at sample 10",
    ),
)
# Over plain torch: (must, goal).
_HOST_BOUNDS = {
    ("zero1", "step"): (1.25, 1.1),
    ("zero2", "step"): (1.3, 1.15),
    ("zero3", "step"): (1.8, 1.4),
    ("zero1", "micro_batch"): (1.25, 1.1),
    ("zero2", "micro_batch"): (1.3, 1.15),
    ("zero3", "micro_batch"): (1.6, 1.3),
}
HOST = tuple(
    Target(
        f"{layout}_{what}",
        *_HOST_BOUNDS[layout, what],
        "lower",
        f"the host's time of {about} under {layout} over plain torch",
        seconds=30,
    )
    for layout in ("zero1", "zero2", "zero3")
    for what, about in (("step", "a step"), ("micro_batch", "a micro-batch but the last"))
)


@dataclass(frozen=True)
class Suite:
    """A benchmark suite.

    Attributes:
        module: measures the rows: `measure(target, setting) -> Row`, and optionally
            `check(setting)`, which raises an LbrError where the suite cannot run at all.
        about: what it measures.
        targets: its rows, in the order in which they are measured.
        takes_data: whether it uses `--data`.
    """

    module: str
    about: str
    targets: tuple[Target, ...]
    takes_data: bool = False

    def chosen(self, rows: Iterable[str]) -> tuple[Target, ...]:
        """Return the targets of the rows named, in the suite's order; of all rows if none is named.

        Raises:
            ConfigError: there is no such row; the message names the nearest ones.
        """
        known = {target.measure: target for target in self.targets}
        wanted = list(rows)
        for name in wanted:
            if name not in known:
                near = [row for row in known if name in row]
                near = near[:4] or difflib.get_close_matches(name, known, 3, 0.5)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
                )
                raise ConfigError(f"--row {name}: there is no such row; {hint}")
        return tuple(t for name, t in known.items() if not wanted or name in wanted)


SUITES = {
    "gpu": Suite(
        "lbr_ds.bench.gpu", "Measure how well training uses one GPU.", GPU, takes_data=True
    ),
    "host": Suite("lbr_ds.bench.host", "Measure the engine's overhead on the CPU.", HOST),
    "loader": Suite(
        "lbr_ds.bench.loader", "Measure the speed of the data loader.", LOADER, takes_data=True
    ),
}


def find_suite(name: str) -> Suite:
    """Return a suite by name. Raises ConfigError for an unknown one."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUITES)}"
        raise ConfigError(f"unknown suite {name!r}; {hint}")
    return SUITES[name]
