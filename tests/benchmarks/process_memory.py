"""Measure the memory that a piece of work adds, in a process of its own.

    extra_bytes("tests.benchmarks.stage2:score", way="tiled", queries=4096, ...)

The named function receives the settings, prepares, and returns the work. On a GPU the peak is the
allocator's. On the host it is the high-water mark of resident memory, which is reset
(`/proc/self/clear_refs`) before the work; glibc is set to map every tensor separately and to unmap
it at once, so that resident memory is memory in use. The work runs twice and the second run counts,
because the first one includes what libraries set up once.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import children

_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "1",
}


def extra_bytes(work: str, **settings: Any) -> float:
    """Return the bytes that `work` ("module:function") added, or raise EnvironmentProblem."""
    env = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-W", "ignore", "-m", __name__, work, json.dumps(settings)]
    done = subprocess.run(command, env=children.environment(env), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentProblem(f"measuring the memory of {work} failed: {reason}")
    return float(done.stdout.splitlines()[-1])


def measured(work: Callable[[], object]) -> float:
    """Return the bytes at the peak of `work()` beyond those before it."""
    work()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    resident = _resident("VmRSS")
    work()
    return _resident("VmHWM") - resident


def _resident(which: str) -> float:
    """Return bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(which))


if __name__ == "__main__":
    children.follow_starter()
    module, _, name = sys.argv[1].partition(":")
    prepare = getattr(importlib.import_module(module), name)
    print(measured(prepare(**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # DeepSpeed's threads may abort at interpreter exit
