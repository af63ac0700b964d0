"""Start the ranks of one machine and wait for them. Under SLURM, srun does this instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lbr_ds.config.training import check_world
from lbr_ds.distributed import HOSTED_STORE, heartbeat_store, host_store, launched_ranks
from lbr_ds.errors import ConfigError, EnvironmentProblem, LbrError, LostRank
from lbr_ds.system import children
from lbr_ds.system.environment import free_host_memory
from lbr_ds.system.process_pool import cores
from lbr_ds.training.heartbeat import last_heartbeat, report_failure

_GRACE_SECONDS = 10  # between the end of a rank and killing the others
# glibc returns large tensors to the kernel and allocates them again at every step; on CPU ranks
# that was a fifth of all processor time. Keeping them halves the time spent in the kernel.
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
_RANKS_PER_CORE = 4  # on CPU: more ranks than cores are slow, but useful to test a layout
_RANK_BYTES = 256 << 20  # of a process that has imported torch and DeepSpeed, without a model


def check_nproc(nproc: int, samples_per_step: Iterable[int] = ()) -> None:
    """Check that this machine can run `nproc` ranks, before any is started.

    Whether a model fits into memory is checked by `lbr-ds plan` and `lbr-ds doctor`; here only the
    processes themselves are counted.

    Args:
        nproc: Number of ranks.
        samples_per_step: Of the stages that the ranks will train.

    Raises:
        ConfigError: `nproc` does not divide the samples of a step.
        EnvironmentProblem: There are too few GPUs, or, without a GPU, too few cores or too little
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


def ranks_to_start(nproc: int | None, samples_per_step: int) -> int:
    """Return how many ranks of a training to start here: `nproc`, or one per GPU.

    Returns:
        0 in a process that a launcher has started, which is a rank itself.

    Raises:
        ConfigError: `nproc` is given although a launcher has started the ranks, or does not divide
            the samples of a step.
        EnvironmentProblem: This machine cannot run so many ranks.
    """
    if launched_ranks():
        if nproc is not None:
            raise ConfigError(
                f"--nproc {nproc}: a launcher has started the ranks already; leave it out"
            )
        return 0
    count = nproc or max(1, torch.cuda.device_count())
    check_nproc(count, [samples_per_step])
    return count


def launch_training(
    recipe: str | Path, stage: int, nproc: int, *, overrides: Sequence[str] = (), force: bool
) -> int:
    """Run `lbr-ds train` as `nproc` ranks; see `launch`."""
    arguments = ["train", str(recipe), *overrides, "--stage", str(stage)]
    return launch([*arguments, *(["--force"] if force else [])], nproc)


def launch(arguments: list[str], nproc: int, module: str = "lbr_ds") -> int:
    """Run `python -m MODULE ARGUMENTS` as `nproc` ranks.

    When one rank fails the others are stopped: they would wait for it in a collective. Signals are
    passed on to all ranks.

    Returns:
        The first non-zero exit code, or 0.

    Raises:
        EnvironmentProblem: This machine cannot run so many ranks.
        LostRank: A rank was killed by a signal.
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
                    **HOSTED_STORE,
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
            children.send_signals(ranks, signals)  # those that came before all ranks had started
            return _wait(ranks, heartbeat_store(store), signals)
        finally:
            _stop(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]], heartbeats: Any, signals: list[int]) -> int:
    """Wait until all ranks have succeeded, or one has failed."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                raise _killed(rank, -code, heartbeats, signals)
        failed = [code for code in codes if code]
        if failed:
            return min(failed)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _killed(rank: int, number: int, heartbeats: Any, signals: list[int]) -> LbrError:
    """Return the error for a rank that signal `number` ended, after reporting it to the others."""
    name = signal.Signals(number).name
    if number in signals:  # from the user or the scheduler, outside of the loop that saves
        stopped = LbrError(
            f"stopped by {name} before a new checkpoint could be saved; run the same command "
            "again: training resumes from its last checkpoint, if it has saved one"
        )
        stopped.exit_code = children.shell_exit_code(-number)
        return stopped
    seen = last_heartbeat(heartbeats, rank)
    where = f" ({seen})" if seen else ""
    # Not "out of memory", by which `bench cluster` recognises layouts that need too much.
    hint = "" if number != signal.SIGKILL else "often the host had no memory left for it; "
    lost = LostRank(
        f"rank {rank} was killed by {name}{where}; {hint}run the same command again: training "
        "resumes from its last checkpoint, if it has saved one"
    )
    report_failure(heartbeats, lost.exit_code, str(lost))
    return lost


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End all ranks. They have some time to end by themselves; a SIGTERM would make them save."""
    running = [process for process in ranks if process.poll() is None]
    deadline = time.monotonic() + _GRACE_SECONDS
    while running and time.monotonic() < deadline:
        time.sleep(0.05)
        running = [process for process in running if process.poll() is None]
    for process in running:
        process.kill()
        process.wait()
