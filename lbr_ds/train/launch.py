"""Start the ranks of one machine and see them through. Under SLURM srun does this instead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import torch

from lbr_ds.errors import TrainingError

_GRACE_SECONDS = 10  # between asking the other ranks to stop and killing them
# glibc gives large tensors back to the kernel and asks for them again at every step; on CPU ranks
# that was a fifth of all processor time. Keeping them halves the time spent in the kernel.
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
_FORWARDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def launch(arguments: list[str], nproc: int, module: str = "lbr_ds") -> int:
    """Run `python -m MODULE ARGUMENTS` as `nproc` ranks; returns the first non-zero exit code or 0.

    When one rank fails the others are stopped: they would wait for it in a collective. Signals are
    passed on to all ranks. Raises TrainingError when a rank was killed by a signal.
    """
    port = free_port()
    allocator = {} if torch.cuda.is_available() else _ALLOCATOR
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // nproc))
    ranks = []
    for rank in range(nproc):
        env = {
            **allocator,
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads,
        }  # fmt: skip
        command = [sys.executable, "-m", module, *arguments]
        ranks.append(subprocess.Popen(command, env=env))

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended well, or the first has not."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                raise TrainingError(f"rank {rank} was killed by {name}; the last checkpoint stands")
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
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


def free_port() -> int:
    """A TCP port that nobody on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
