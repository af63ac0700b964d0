"""A recipe and a cluster -> memory, traffic and time, before any GPU is asked for.

    result = plan(run, Cluster(1, 8, find_gpu("h100")))
    result["verdict"], result["layouts"][0]["stages"][0]["gpu_gib"]

From the backbone's config.json alone: no weights, no GPU, no torch, no network. shape.py counts
parameters, work.py what a step sends through them, memory.py bytes, pace.py traffic and time;
table.py prints; check.py holds the memory of real ranks against it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lbr_ds.cluster.plan.gpus import Cluster, Gpu, find_gpu
from lbr_ds.cluster.plan.memory import RESERVE, Memory, memory_of
from lbr_ds.cluster.plan.pace import ASSUMED, pace_of, traffic_of
from lbr_ds.cluster.plan.shape import Shape, shape_of
from lbr_ds.cluster.plan.work import num_steps, work_of
from lbr_ds.config import STAGES, RunConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.config.ds_config import Layout
from lbr_ds.shards import Manifest
from lbr_ds.system import resources
from lbr_ds.system.urls import is_url

__all__ = ["Cluster", "Gpu", "find_gpu", "plan", "predict"]
FILL = 0.92  # of the GPU's memory: above, fragments and longer texts end the run
GIB = 1 << 30


def plan(run: RunConfig, cluster: Cluster, config: Path | None = None) -> dict[str, Any]:
    """Every shipped ds_config and the recipe's own, both stages each; JSON-ready.

    `best` has the least traffic of those that fit and send every number as it is.

    config: the backbone's config.json where it is not found by itself. Raises ConfigError for a
    backbone of unknown shape, and for a step that the ranks cannot share.
    """
    shape = shape_of(run, config)
    rows = [_row(shape, name, run, cluster) for name in _names(run)]
    fitting = [row for row in rows if row["fits"] and not row["lossy"]]
    best = min(fitting, key=lambda r: (r["traffic_gib"], r["step_seconds"]), default=None)
    chosen = layouts.resolve_name(run.engine.ds_config, gpu=True)
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
            "learning": shape.learnt,
            "activation_checkpointing": run.model.activation_checkpointing,
        },
        "assumed": {**ASSUMED, "fill": FILL, "reserve_gib": RESERVE / GIB},
        "layouts": rows,
        "recipe_layout": chosen,
        "best": best["ds_config"] if best else None,
    }


def _names(run: RunConfig) -> list[str]:
    """The shipped ds_configs, and the recipe's own where it is another."""
    names = sorted(p.stem for p in resources.shipped_folder("ds_configs").glob("*.json"))
    own = run.engine.ds_config
    return names if own in ("auto", *names) else [*names, own]


def _row(shape: Shape, name: str, run: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """One layout, both stages. `fits` when both do; else `reason`."""
    layout = layouts.load(name)
    stages = [predict(shape, layout, run, cluster, number) for number in (1, 2)]
    reasons = [s["reason"] for s in stages if s["reason"]]
    return {
        "ds_config": name,
        "zero_stage": layout.stage,
        "lossy": layout.lossy,
        "fits": not reasons,
        "reason": reasons[0] if reasons else None,
        "traffic_gib": sum(s["traffic_gib"]["total"] for s in stages),
        "step_seconds": sum(s["step_seconds"] for s in stages),
        "stages": stages,
    }


def predict(
    shape: Shape, layout: Layout, run: RunConfig, cluster: Cluster, number: int
) -> dict[str, Any]:
    """One layout in one stage, JSON-ready. Raises ConfigError when ranks cannot share a step."""
    world, checkpointing = cluster.world, run.model.activation_checkpointing
    work = work_of(run, number, world)

    def memory(checkpointing: bool) -> Memory:
        return memory_of(shape, layout, work, world=world, checkpointing=checkpointing)

    found = memory(checkpointing)
    pace = pace_of(shape, layout, work, cluster, checkpointing)
    traffic = traffic_of(shape, layout, work, cluster)
    steps = num_steps(run, number, _prepared(run, number))
    useful = work.useful(shape)
    peak = cluster.gpu.tflops * 1e12
    return {
        "stage": number,
        "reason": _refusal(layout, found, cluster),
        "gpu_gib": {
            "stays": {part: size / GIB for part, size in found.stays.items()},
            "phases": {phase: size / GIB for phase, size in found.phases.items()},
            "reserve": RESERVE / GIB,
            "peak": (found.peak + RESERVE) / GIB,
            "peak_without_checkpointing": (memory(False).peak + RESERVE) / GIB,
            "peak_with_checkpointing": (memory(True).peak + RESERVE) / GIB,
        },
        "host_gib_per_node": found.host * cluster.per_node / GIB,
        "work": dataclasses.asdict(work),
        "traffic_gib": {
            **{way: size / GIB for way, size in dataclasses.asdict(traffic).items()},
            "total": traffic.total / GIB,
        },
        "seconds": dataclasses.asdict(pace),
        "step_seconds": pace.seconds,
        "tokens_per_second_per_gpu": work.tokens / pace.seconds,
        "mfu": useful / (pace.seconds * peak),
        "steps": steps,
        "days": None if steps is None else steps * pace.seconds / 86400,
    }


def _prepared(run: RunConfig, number: int) -> int | None:
    """Records of the stage's split where the data stands on this disk already."""
    folder = run.data.folder
    if is_url(folder) or not (Path(folder) / "manifest.json").is_file():
        return None
    return Manifest.load(folder).records(STAGES[number].split)


def _refusal(layout: Layout, found: Memory, cluster: Cluster) -> str | None:
    """Why this layout cannot run here, in one clause; None when it can."""
    gpu = cluster.gpu
    if layout.width == 4:
        return "fp32: for CPU ranks"
    if reason := layout.unfit(cluster.world, gpus=True):
        return reason
    if cluster.per_node % layout.group(cluster.world):
        return (
            f"zero_hpz_partition_size={layout.hpz} does not divide {cluster.per_node} GPUs a node"
        )
    need, have = (found.peak + RESERVE) / GIB, FILL * gpu.memory_gib
    if need > have:
        filled = f"{FILL:.0%} of {gpu.memory_gib:g}"
        return f"needs {need:.0f} GiB a GPU, {have:.0f} may be filled ({filled})"
    host = found.host / GIB
    if host > gpu.host_memory_gib:
        return f"needs {host:.0f} GiB of host memory a GPU, {gpu.host_memory_gib:g} assumed there"
    return None
