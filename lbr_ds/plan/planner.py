"""Plan a recipe on a cluster: memory, traffic and time of every ds_config, in both stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lbr_ds.config import STAGES, RunConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.config.ds_config import Layout
from lbr_ds.plan import pace
from lbr_ds.plan.gpus import Cluster
from lbr_ds.plan.memory import RESERVE, Memory, memory_of
from lbr_ds.plan.shape import Shape, shape_of
from lbr_ds.plan.speed import ASSUMED, step_time, traffic_of
from lbr_ds.plan.work import num_steps, work_of
from lbr_ds.shards import Manifest
from lbr_ds.system import resources
from lbr_ds.system.urls import is_url

FILL = 0.92  # share of the GPU's memory; above it, fragmentation and longer texts end the run
GIB = 1 << 30


def make_plan(run: RunConfig, cluster: Cluster, config: Path | None = None) -> dict[str, Any]:
    """Plan every shipped ds_config and the recipe's own.

    Args:
        run: the recipe.
        cluster: nodes and GPUs.
        config: the backbone's config.json, if it is not found by itself.

    Returns:
        A dict that is ready for JSON. `best` names the fastest ds_config among those that fit and
        do not quantize; one that offloads only if no other fits.

    Raises:
        ConfigError: the backbone's shape is not known, or the ranks cannot share a step.
    """
    shape = shape_of(run, config)
    rows = [_row(shape, name, run, cluster) for name in _names(run)]
    fitting = [row for row in rows if row["fits"] and not row["lossy"]]
    best = min(fitting, key=lambda r: (r["offloads"], r["step_seconds"]), default=None)
    return {
        "recipe": run.name,
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.per_node,
            "gpus": cluster.world,
            "gpu": cluster.gpu.model_dump(),
        },
        "model": {
            "backbone": run.model.backbone,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "vocabulary": shape.vocab,
            "parameters": shape.total,
            "trainable": shape.trainable,
            "activation_checkpointing": run.model.activation_checkpointing,
        },
        "assumed": {**ASSUMED, **pace.ASSUMED, "fill": FILL, "reserve_gib": RESERVE / GIB},
        "layouts": rows,
        "recipe_layout": layouts.resolve_name(run.engine.ds_config, gpu=True),
        "best": best["ds_config"] if best else None,
    }


def _names(run: RunConfig) -> list[str]:
    """Return the shipped ds_configs, and the recipe's own if it is another."""
    names = sorted(p.stem for p in resources.shipped_folder("ds_configs").glob("*.json"))
    own = run.engine.ds_config
    return names if own in ("auto", *names) else [*names, own]


def _row(shape: Shape, name: str, run: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Return one layout with both stages. `fits` if both do, else `reason` says why not."""
    layout = layouts.load(name)
    stages = [predict(shape, layout, run, cluster, number) for number in STAGES]
    reasons = [s["reason"] for s in stages if s["reason"]]
    return {
        "ds_config": name,
        "zero_stage": layout.stage,
        "lossy": layout.lossy,
        "offloads": layout.offload_optimizer + layout.offload_parameters,
        "fits": not reasons,
        "reason": reasons[0] if reasons else None,
        "traffic_gib": sum(s["traffic_gib"]["total"] for s in stages),
        "step_seconds": sum(s["step_seconds"] for s in stages),
        "stages": stages,
    }


def predict(
    shape: Shape, layout: Layout, run: RunConfig, cluster: Cluster, number: int
) -> dict[str, Any]:
    """Predict one layout in stage `number`, ready for JSON.

    Raises:
        ConfigError: the ranks cannot share a step.
    """
    world, checkpointing = cluster.world, run.model.activation_checkpointing
    work = work_of(run, number, world)
    with_, without = (
        memory_of(shape, layout, work, world=world, checkpointing=on) for on in (True, False)
    )
    memory = with_ if checkpointing else without
    time = step_time(shape, layout, work, cluster, checkpointing)
    traffic = traffic_of(shape, layout, work, cluster)
    steps = num_steps(run, number, _prepared_records(run, number))
    peak = cluster.gpu.tflops * 1e12
    return {
        "stage": number,
        "reason": _refusal(layout, memory, cluster),
        "gpu_gib": {
            "states": {part: size / GIB for part, size in memory.states.items()},
            "phases": {phase: size / GIB for phase, size in memory.phases.items()},
            "reserve": RESERVE / GIB,
            "peak": (memory.peak + RESERVE) / GIB,
            "peak_without_checkpointing": (without.peak + RESERVE) / GIB,
            "peak_with_checkpointing": (with_.peak + RESERVE) / GIB,
        },
        "host_gib_per_node": memory.host * cluster.per_node / GIB,
        "work": dataclasses.asdict(work),
        "traffic_gib": {
            **{way: size / GIB for way, size in dataclasses.asdict(traffic).items()},
            "total": traffic.total / GIB,
        },
        "seconds": dataclasses.asdict(time),
        "step_seconds": time.seconds,
        "tokens_per_second_per_gpu": work.tokens / time.seconds,
        "mfu": work.useful_flops(shape) / (time.seconds * peak),
        "steps": steps,
        "days": None if steps is None else steps * time.seconds / 86400,
    }


def _prepared_records(run: RunConfig, number: int) -> int | None:
    """Return the records of the stage's split, if the data is prepared on this disk."""
    folder = run.data.folder
    if is_url(folder) or not (Path(folder) / "manifest.json").is_file():
        return None
    return Manifest.load(folder).records(STAGES[number].split)


def _refusal(layout: Layout, memory: Memory, cluster: Cluster) -> str | None:
    """Return why this layout cannot run here, in one clause; None if it can."""
    gpu = cluster.gpu
    if layout.width == 4:
        return "not for GPUs (fp32)"
    if reason := layout.unfit(cluster.world, gpus=True):
        return reason
    if cluster.per_node % layout.group(cluster.world):
        return (
            f"zero_hpz_partition_size={layout.hpz} does not divide {cluster.per_node} GPUs a node"
        )
    need, have = (memory.peak + RESERVE) / GIB, FILL * gpu.memory_gib
    if need > have:
        filled = f"{FILL:.0%} of {gpu.memory_gib:g}"
        return f"needs {need:.0f} GiB per GPU, {have:.0f} may be filled ({filled})"
    host = memory.host / GIB
    if host > gpu.host_memory_gib:
        return f"needs {host:.0f} GiB of host memory per GPU, {gpu.host_memory_gib:g} assumed"
    return None
