"""Measure the peak memory of one call."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints to stderr at every start and stop


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the largest memory that run() held at once, beyond what was allocated before it.

    On a GPU torch's allocator counts it. On a CPU it follows from the profiler's record of every
    allocation and release, so the C library's reserve and other processes do not count.
    """
    gc.collect()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    assert recorded.profiler is not None
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
