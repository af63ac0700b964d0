"""How many jobs of a table this machine has memory for, and which GPUs each of them gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from lbr_ds.config import ds_config as layouts
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.plan import auto
from lbr_ds.plan.fit import GIB, fill, memory_on, reserve
from lbr_ds.plan.gpus import Cluster, Gpu
from lbr_ds.plan.shape import prepared_shape
from lbr_ds.plan.work import work_of
from lbr_ds.reproduce.jobs import Job
from lbr_ds.system.environment import free_host_memory
from lbr_ds.system.process_pool import cores

log = logging.getLogger(__name__)

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


def device() -> Gpu:
    """Return what a rank of this machine runs on, as the planner knows it."""
    from lbr_ds.training.auto import device_of

    return device_of(None, 1)


def _groups(gpus: int, nproc: int) -> int:
    """Return how many jobs can have GPUs of their own; 0 without a GPU."""
    return gpus // nproc if gpus else 0


def check_memory(jobs: Sequence[Job], at_once: int, nproc: int) -> list[str]:
    """Check that the memory of GPUs and host suffices for `at_once` jobs of a table.

    Any of the jobs may run together, so the largest ones count.

    Returns:
        Overrides for the jobs: the share of the memory with which keys set to `auto` plan.

    Raises:
        EnvironmentProblem: it does not; the message says how many jobs fit.
    """
    gpus, host = num_gpus(), free_host_memory()
    trainings = [job for job in jobs if job.phase]
    at_once = max(1, min(at_once, len(trainings)))
    groups = _groups(gpus, nproc) or 1
    free = free_gpu_memory() if gpus else host // nproc
    share = free / GIB / -(-at_once // groups)
    gpu = device().model_copy(update={"memory_gib": share})
    needs = [n for job in trainings if (n := needs_of(job, Cluster(1, nproc, gpu)))]
    _check("host memory", sorted((n[1] for n in needs), reverse=True), host, at_once, 1)
    if gpus:
        largest = sorted((n[0] for n in needs), reverse=True)
        _check("GPU memory", largest, int(fill(gpu) * free), at_once, groups)
    open_keys = any(auto.is_open(job.run, job.phase) for job in trainings)
    given = any(job.run.engine.memory_gib for job in trainings)
    return [f"engine.memory_gib={share:.3f}"] if open_keys and not given else []


def _check(what: str, needs: Sequence[int], free: int, at_once: int, groups: int) -> None:
    """Raise EnvironmentProblem if the largest `at_once` jobs, divided among groups, do not fit."""

    def fits(count: int) -> bool:
        return sum(needs[: -(-count // groups)]) <= free

    if at_once < 2 or fits(at_once):
        return
    most = max((n for n in range(1, at_once) if fits(n)), default=1)
    raise EnvironmentProblem(
        f"--jobs {at_once}: the largest job needs {needs[0] / GIB:.1f} GiB of {what}, but only "
        f"{free / GIB:.1f} GiB are available for {-(-at_once // groups)} of them at once; "
        f"use --jobs {most}"
    )


def needs_of(job: Job, cluster: Cluster) -> Needs | None:
    """Return the memory of a training by the plan; None where the backbone's shape is not known.

    Args:
        job: of phase 1 or 2.
        cluster: its ranks; keys set to `auto` get the values that fit into their memory.
    """
    run, number, gpu = job.run, job.phase, cluster.gpu
    backbone = job.links[0][1]
    try:
        shape = prepared_shape(run.model_copy(update={"run": backbone.parent}))
    except ConfigError as error:
        log.info("%s: memory is not checked: %s", job.folder.name, error)
        return None
    if auto.is_open(run, number):
        run = auto.settled(run, number, auto.choose(run, number, shape, cluster))
    memory = memory_on(
        run,
        shape,
        layouts.load(run.engine.ds_config),
        work_of(run, number, cluster.world),
        cluster,
        bool(run.model.activation_checkpointing),
    )
    nproc, peak = cluster.world, memory.peak + reserve(gpu)
    processes = (nproc + 2) * _PROCESS_BYTES[not gpu.cpu]
    if gpu.cpu:
        return 0, (peak + memory.host) * nproc + processes
    return peak, memory.host * nproc + _SAVED * shape.total + processes
