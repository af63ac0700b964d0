"""How many jobs of a table this machine has memory for, and which GPUs each of them gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lbr_ds.config import ds_config as layouts
from lbr_ds.corpora.process_pool import cores
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.plan.memory import RESERVE, memory_of
from lbr_ds.plan.planner import FILL
from lbr_ds.plan.shape import shape_of
from lbr_ds.plan.work import work_of
from lbr_ds.reproduce.jobs import Job
from lbr_ds.system.environment import free_host_memory

log = logging.getLogger(__name__)

GIB = 1 << 30
_PROCESS_BYTES = {False: 256 << 20, True: 3 << 30}  # of a process with torch; True: with CUDA
_SAVED = 16  # bytes of host memory per parameter while a checkpoint is saved
Needs = tuple[int, int]  # bytes of one job: of each of its GPUs, and of the host


def environments(at_once: int, nproc: int) -> list[dict[str, str]]:
    """Return the environment variables of the jobs of each slot.

    The cores are divided among the jobs. With several GPUs, each job sees as many as it has ranks,
    the next ones in turn; a job that takes all sees all.

    Args:
        at_once: number of slots.
        nproc: ranks of a job.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // (at_once * nproc)))
    count = num_gpus()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",")[:count] if given else [str(n) for n in range(count)]
    made = []
    for slot in range(at_once):
        own = {"OMP_NUM_THREADS": threads}
        if groups := _groups(count, nproc):
            first = slot % groups * nproc
            own["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first : first + nproc])
        made.append(own)
    return made


def num_gpus() -> int:
    """Return the number of GPUs that this process sees."""
    import torch

    return torch.cuda.device_count()


def free_gpu_memory() -> int:
    """Return the free bytes of the GPU that has the least."""
    import torch

    return min(torch.cuda.mem_get_info(number)[0] for number in range(num_gpus()))


def _groups(gpus: int, nproc: int) -> int:
    """Return how many jobs can have GPUs of their own; 0 without a GPU."""
    return gpus // nproc if gpus else 0


def check_memory(jobs: Sequence[Job], at_once: int, nproc: int) -> None:
    """Check that the memory of GPUs and host suffices for `at_once` jobs of a table.

    Any of the jobs may run together, so the largest ones count.

    Raises:
        EnvironmentProblem: it does not; the message says how many jobs fit.
    """
    gpus = num_gpus()
    needs = [n for job in jobs if job.phase and (n := needs_of(job, nproc, gpu=gpus > 0))]
    at_once = min(at_once, len(needs))
    host = sorted((n[1] for n in needs), reverse=True)
    _check("host memory", host, free_host_memory(), at_once, 1)
    if gpus:
        device = sorted((n[0] for n in needs), reverse=True)
        _check("GPU memory", device, int(FILL * free_gpu_memory()), at_once, _groups(gpus, nproc))


def _check(what: str, needs: Sequence[int], free: int, at_once: int, groups: int) -> None:
    """Raise EnvironmentProblem if the largest `at_once` jobs, divided among groups, do not fit."""

    def fits(count: int) -> bool:
        return sum(needs[: -(-count // groups)]) <= free

    if at_once < 2 or fits(at_once):
        return
    most = max((n for n in range(1, at_once) if fits(n)), default=1)
    raise EnvironmentProblem(
        f"--jobs {at_once}: the largest job needs {needs[0] / GIB:.1f} GiB of {what}, and "
        f"{free / GIB:.1f} may be used for {-(-at_once // groups)} at once; use --jobs {most}"
    )


def needs_of(job: Job, nproc: int, *, gpu: bool) -> Needs | None:
    """Return the memory of a training by the plan; None where the backbone's shape is not known."""
    run, number = job.run, job.phase
    prepared = job.links[0][1] / "config.json"
    try:
        shape = shape_of(run, prepared if prepared.is_file() else None)
    except ConfigError as error:
        log.info("%s: memory is not checked: %s", job.folder.name, error)
        return None
    memory = memory_of(
        shape,
        layouts.load(layouts.resolve_name(run.engine.ds_config, gpu=gpu)),
        work_of(run, number, nproc),
        world=nproc,
        checkpointing=run.model.activation_checkpointing,
        gpu=gpu,
    )
    processes = (nproc + 2) * _PROCESS_BYTES[gpu]
    if gpu:
        return memory.peak + RESERVE, memory.host * nproc + _SAVED * shape.total + processes
    return 0, (memory.peak + memory.host) * nproc + processes
