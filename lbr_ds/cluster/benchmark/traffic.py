"""What collectives cost: their bandwidth between the ranks, and their share of a step's time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lbr_ds.cluster.device import clock
from lbr_ds.distributed import World

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks on stderr at every start and stop

MIB = 1 << 20
SIZES = {"cuda": (1, 8, 64, 512), "cpu": (1, 4, 16)}  # MiB of the whole that is gathered
_ROUNDS = 5
Spans = list[tuple[int, int]]  # (begin, end) in ns, by rising begin, none touching the next


def bandwidth(world: World) -> list[dict[str, Any]]:
    """All-gather and reduce-scatter over all ranks: a row for each size. All ranks call it.

    bytes: of the whole, S. gb_per_second: S (N-1)/N over the median seconds of the slowest rank, in
    1e9 bytes: what a rank receives, so what its link or port carried (nccl-tests' busbw). Numbers
    are bf16 on GPUs, as parameters and gradients are there, and fp32 on CPU ranks.
    """
    kind = world.device.type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    rows = []
    for size in SIZES[kind]:
        count = size * MIB // dtype.itemsize // world.size
        part = torch.zeros(count, dtype=dtype, device=world.device)
        whole = torch.zeros(count * world.size, dtype=dtype, device=world.device)
        ways: dict[str, Callable[[], None]] = {
            "all_gather": partial(world.all_gather, whole, part),
            "reduce_scatter": partial(world.reduce_scatter, part, whole),
        }
        for name, run in ways.items():
            seconds = _slowest_seconds(run, world)
            carried = whole.nbytes * (world.size - 1) / world.size
            rows.append(
                {
                    "collective": name,
                    "bytes": whole.nbytes,
                    "seconds": seconds,
                    "gb_per_second": carried / seconds / 1e9,
                }
            )
    return rows


def _slowest_seconds(run: Callable[[], None], world: World) -> float:
    """Median over rounds, after one that is not counted, each begun together."""
    found = []
    for _ in range(_ROUNDS + 1):
        world.barrier()
        begin = clock()
        run()
        found.append(clock() - begin)
    return world.max(statistics.median(found[1:]))[0]


def shares(run: Callable[[], object]) -> tuple[float, float]:
    """(share of run()'s time in collectives, share of it in which only they ran) on this rank.

    From torch's profiler. On a GPU: NCCL's kernels against all other kernels. On CPU ranks: gloo's
    collectives, from call to completion, against torch's operators (`aten::`). Waiting for a slower
    rank inside a collective counts as the collective. The second share is what a faster network,
    or more overlap, could win back.
    """
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        begin = clock()
        run()
        seconds = clock() - begin
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    if on_gpu:
        events = [e for e in events if e.activity_type() == "kernel"]
    wires = joined(_span(e) for e in events if _wired(e.name()))
    work = joined(
        _span(e)
        for e in events
        if not _wired(e.name()) and (on_gpu or e.name().startswith("aten::"))
    )
    alone = length(joined([*wires, *work])) - length(work)
    return length(wires) / 1e9 / seconds, alone / 1e9 / seconds


def _wired(name: str) -> bool:
    return name.startswith(("gloo:", "nccl"))


def _span(event: Any) -> tuple[int, int]:
    return event.start_ns(), event.start_ns() + event.duration_ns()


def joined(spans: Iterable[tuple[int, int]]) -> Spans:
    """The same stretches of time with overlapping ones made one."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(spans: Spans) -> int:
    """Their sum."""
    return sum(end - begin for begin, end in spans)
