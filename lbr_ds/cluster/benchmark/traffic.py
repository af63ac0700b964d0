"""Measure what collectives cost: their bandwidth, and their share of a step's time."""

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

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints to stderr at every start and stop

MIB = 1 << 20
SIZES = {"cuda": (1, 8, 64, 512), "cpu": (1, 4, 16)}  # MiB of the gathered tensor
_ROUNDS = 5
Spans = list[tuple[int, int]]  # (begin, end) in ns, by rising begin, none touching the next


def bandwidth(world: World) -> list[dict[str, Any]]:
    """Measure all-gather and reduce-scatter over all N ranks. All ranks call it.

    Returns:
        A row for each collective and size. bytes: S, of the whole tensor. gb_per_second: S (N-1)/N
        over the median seconds of the slowest rank, in 1e9 bytes: what a rank receives, and so what
        its link or port carries (nccl-tests' busbw). Tensors are bf16 on GPUs and fp32 on CPUs.
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
    """Return the median over rounds that all ranks begin together, after a warm-up round."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        world.barrier()
        begin = clock()
        run()
        seconds.append(clock() - begin)
    return world.max(statistics.median(seconds[1:]))[0]


def collective_shares(run: Callable[[], object]) -> tuple[float, float]:
    """Return the shares of run()'s time (in collectives, in collectives alone) on this rank.

    Measured with torch's profiler: on a GPU NCCL's kernels against all other kernels, on CPU ranks
    gloo's collectives, from call to completion, against torch's operators (`aten::`). Waiting for a
    slower rank inside a collective counts as the collective. The second share is what a faster
    network or more overlap could save.
    """
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        begin = clock()
        run()
        seconds = clock() - begin
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    if on_gpu:
        events = [e for e in events if e.activity_type() == "kernel"]
    wires = merge_spans(_span(e) for e in events if _is_collective(e.name()))
    work = merge_spans(
        _span(e)
        for e in events
        if not _is_collective(e.name()) and (on_gpu or e.name().startswith("aten::"))
    )
    alone = total_length(merge_spans([*wires, *work])) - total_length(work)
    return total_length(wires) / 1e9 / seconds, alone / 1e9 / seconds


def _is_collective(name: str) -> bool:
    return name.startswith(("gloo:", "nccl"))


def _span(event: Any) -> tuple[int, int]:
    return event.start_ns(), event.start_ns() + event.duration_ns()


def merge_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    """Return the same spans of time, with overlapping ones merged."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def total_length(spans: Spans) -> int:
    """Return the sum of the spans' lengths."""
    return sum(end - begin for begin, end in spans)
