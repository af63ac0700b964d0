"""Time and peak memory on the device that this process computes on: its GPU, or the CPU."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import torch


def clock() -> float:
    """Return the time in seconds, after the GPU has finished all work in its queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def reset_peak_memory() -> None:
    """Reset the peak of this process's GPU memory, or of its resident memory (also ru_maxrss)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
