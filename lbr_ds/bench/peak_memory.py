"""Peak memory of one call, beyond what was allocated before it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks on stderr at every start and stop


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most that torch's allocator of `device` held during run() beyond what it held before.

    On a CPU from the profiler's account of every allocation and release, so neither the C library's
    own reserve nor another process has a part in it.
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = peak = 0
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
