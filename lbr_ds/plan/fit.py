"""Whether a layout can run on a cluster: its memory against what a device has, and its limits."""

from __future__ import annotations

import dataclasses

from lbr_ds.config import RunConfig
from lbr_ds.config.ds_config import Layout
from lbr_ds.plan.gpus import Cluster, Gpu
from lbr_ds.plan.memory import Memory, memory_of
from lbr_ds.plan.shape import Shape
from lbr_ds.plan.work import Work

GIB = 1 << 30
GPU_RESERVE = 2 << 30  # bytes for the CUDA context, NCCL's channels and cuBLAS workspaces
_CPU_RESERVE = 256 << 20  # of a process's buffers and pages, beside those of libraries
# Share of the memory; above it, fragmentation and longer texts end the run. On a CPU the page
# cache, loader processes and evaluations need some of what is free at the start.
GPU_FILL, _CPU_FILL = 0.92, 0.7


def fill(gpu: Gpu) -> float:
    """Return the share of a device's memory that may be planned with."""
    return _CPU_FILL if gpu.cpu else GPU_FILL


def reserve(gpu: Gpu) -> int:
    """Return the bytes of a device that libraries take."""
    return _CPU_RESERVE if gpu.cpu else GPU_RESERVE


def memory_on(
    run: RunConfig, shape: Shape, layout: Layout, work: Work, cluster: Cluster, checkpointing: bool
) -> Memory:
    """Return the memory of one rank; on CPU ranks with the copy that is saved in the background."""
    cpu = cluster.gpu.cpu
    memory, *others = (
        memory_of(
            shape, layout, part, world=cluster.world, checkpointing=checkpointing, gpu=not cpu
        )
        for part in work.parts
    )
    for other in others:
        phases = {name: max(size, other.phases[name]) for name, size in memory.phases.items()}
        memory = dataclasses.replace(memory, phases=phases)
    if not cpu or not run.every.save_async:
        return memory
    numbers = layout.master_width + 2 * layout.moment_width
    copy = {"copy for saving": shape.trainable_shard(cluster.world) * numbers}
    return dataclasses.replace(memory, states={**memory.states, **copy})


def refusal(layout: Layout, memory: Memory, cluster: Cluster) -> str | None:
    """Return why a layout cannot run on a cluster, in one clause; None if it can."""
    gpu = cluster.gpu
    if layout.width == 4 and not gpu.cpu:
        return "not for GPUs (fp32)"
    if reason := layout.unfit(cluster.world, gpus=not gpu.cpu):
        return reason
    if cluster.per_node % layout.group(cluster.world):
        return (
            f"zero_hpz_partition_size={layout.hpz} does not divide {cluster.per_node} GPUs a node"
        )
    what = "rank" if gpu.cpu else "GPU"
    need, have = (memory.peak + reserve(gpu)) / GIB, fill(gpu) * gpu.memory_gib
    if need > have:
        filled = f"{fill(gpu):.0%} of {gpu.memory_gib:.4g}"
        return f"needs {need:.3g} GiB per {what}, {have:.3g} may be filled ({filled})"
    host = memory.host / GIB
    if host > gpu.host_memory_gib:
        return f"needs {host:.0f} GiB of host memory per {what}, {gpu.host_memory_gib:g} assumed"
    return None
