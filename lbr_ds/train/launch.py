"""Start the ranks of one machine and see them through. Under SLURM srun does this instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import torch

from lbr_ds.distributed import HOSTED, host_store, words_of
from lbr_ds.errors import LostRank
from lbr_ds.train.watch import last_seen, tell_all

_GRACE_SECONDS = 10  # between asking the other ranks to stop and killing them
# glibc gives large tensors back to the kernel and asks for them again at every step; on CPU ranks
# that was a fifth of all processor time. Keeping them halves the time spent in the kernel.
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
_FORWARDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def launch(arguments: list[str], nproc: int) -> int:
    """Run `python -m lbr_ds ARGUMENTS` as `nproc` ranks; returns the first non-zero exit code or 0.

    When one rank fails the others are stopped: they would wait for it in a collective. Signals are
    passed on to all ranks. Raises LostRank when a rank was killed by a signal.
    """
    store = host_store()
    port = store.port
    allocator = {} if torch.cuda.is_available() else _ALLOCATOR
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // nproc))
    ranks = []
    for rank in range(nproc):
        env = {
            **allocator,
            **os.environ,
            **HOSTED,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads,
        }  # fmt: skip
        command = [sys.executable, "-m", "lbr_ds", *arguments]
        ranks.append(subprocess.Popen(command, env=env))

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        return _wait(ranks, words_of(store))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]], words: Any) -> int:
    """Until all have ended well, or the first has not."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                seen = last_seen(words, rank)
                where = f" ({seen})" if seen else ""
                line = f"rank {rank} was killed by {name}{where}; the last checkpoint stands"
                tell_all(words, LostRank.exit_code, line)
                raise LostRank(line)
        failed = [code for code in codes if code]
        if failed:
            return min(failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Leave no rank behind. A rank that saves on SIGTERM cannot: a peer is gone. So kill late."""
    running = [process for process in ranks if process.poll() is None]
    deadline = time.monotonic() + _GRACE_SECONDS
    while running and time.monotonic() < deadline:
        time.sleep(0.05)
        running = [process for process in running if process.poll() is None]
    for process in running:
        process.kill()
        process.wait()
