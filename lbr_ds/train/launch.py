"""Start the ranks of one machine and see them through. Under SLURM srun does this instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from lbr_ds.corpora.process_pool import cores
from lbr_ds.distributed import HOSTED, host_store, words_of
from lbr_ds.errors import EnvironmentProblem, LbrError, LostRank
from lbr_ds.shards.stream import check_world
from lbr_ds.system import children
from lbr_ds.system.environment import free_host_memory
from lbr_ds.train.watch import last_seen, tell_all

_GRACE_SECONDS = 10  # between asking the other ranks to stop and killing them
# glibc gives large tensors back to the kernel and asks for them again at every step; on CPU ranks
# that was a fifth of all processor time. Keeping them halves the time spent in the kernel.
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
_RANKS_PER_CORE = 4  # on CPU: more ranks than cores are slow, but useful for tests of a layout
_RANK_BYTES = 256 << 20  # of a process that has imported torch and DeepSpeed, without any model


def check_nproc(nproc: int, samples_per_step: Iterable[int] = ()) -> None:
    """Check that this machine can run `nproc` ranks, before any is started.

    Whether a model fits into memory is the question of `lbr-ds plan` and `lbr-ds doctor`; here only
    the processes themselves count.

    Args:
        samples_per_step: of the stages that the ranks will train.

    Raises:
        ConfigError: `nproc` does not divide the samples of a step.
        EnvironmentProblem: there are too few GPUs, or, without a GPU, too few cores or too little
            memory.
    """
    if gpus := torch.cuda.device_count():
        most, why = gpus, f"this machine has {gpus} GPU(s) and each rank needs its own"
    else:
        free = free_host_memory()
        most = min(_RANKS_PER_CORE * cores(), free // _RANK_BYTES)
        why = (
            f"this process may use {cores()} core(s), at most {_RANKS_PER_CORE} ranks each, and "
            f"{free / (1 << 30):.1f} GiB of memory, at least {_RANK_BYTES >> 20} MiB a rank"
        )
    if nproc > max(1, most):
        raise EnvironmentProblem(
            f"{nproc} ranks cannot run on this machine: {why}; use at most {max(1, most)} "
            "(--nproc, or --ranks of bench cluster)"
        )
    for samples in samples_per_step:
        check_world(samples, nproc)


def launch(arguments: list[str], nproc: int, module: str = "lbr_ds") -> int:
    """Run `python -m MODULE ARGUMENTS` as `nproc` ranks; returns the first non-zero exit code or 0.

    When one rank fails the others are stopped: they would wait for it in a collective. Signals are
    passed on to all ranks.

    Raises:
        EnvironmentProblem: this machine has no room for so many ranks.
        LostRank: a rank was killed by a signal.
    """
    check_nproc(nproc)
    store = host_store()
    allocator = {} if torch.cuda.is_available() else _ALLOCATOR
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // nproc))
    ranks: list[subprocess.Popen[bytes]] = []
    with children.forward_signals(ranks) as signals:
        try:
            for rank in range(nproc):
                env = {
                    **allocator,
                    **os.environ,
                    **HOSTED,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(nproc),
                    "LOCAL_WORLD_SIZE": str(nproc),
                    "OMP_NUM_THREADS": threads,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port),
                }
                command = [sys.executable, "-m", module, *arguments]
                ranks.append(subprocess.Popen(command, env=children.environment(env)))
            children.send_signals(ranks, signals)  # those that came while some ranks were not there
            return _wait(ranks, words_of(store), signals)
        finally:
            _stop(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]], words: Any, signals: list[int]) -> int:
    """Until all have ended well, or the first has not."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                raise _killed(rank, -code, words, signals)
        failed = [code for code in codes if code]
        if failed:
            return min(failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _killed(rank: int, number: int, words: Any, signals: list[int]) -> LbrError:
    """The error for a rank that signal `number` has ended; the other ranks know of it then."""
    name = signal.Signals(number).name
    if number in signals:  # the user's or scheduler's own, before or after the time to save
        stopped = LbrError(
            f"stopped by {name} before a new checkpoint could be saved; run the same command "
            "again: training resumes from its last checkpoint, if it has saved one"
        )
        stopped.exit_code = children.shell_exit_code(-number)
        return stopped
    seen = last_seen(words, rank)
    where = f" ({seen})" if seen else ""
    # Not "out of memory", by which `bench cluster` knows layouts that need more than there is.
    hint = "" if number != signal.SIGKILL else "often the host has no memory left for it; "
    lost = LostRank(
        f"rank {rank} was killed by {name}{where}; {hint}run the same command again: training "
        "resumes from its last checkpoint, if it has saved one"
    )
    tell_all(words, lost.exit_code, str(lost))
    return lost


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
