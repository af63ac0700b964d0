"""Plan a recipe on a cluster: memory, traffic and time of every ds_config, in both stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lbr_ds.config import STAGES, RunConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.config.ds_config import Layout
from lbr_ds.plan import auto, pace
from lbr_ds.plan.encoding import Corpus, plan_encoding
from lbr_ds.plan.fit import GIB, fill, memory_on, refusal, reserve
from lbr_ds.plan.gpus import Cluster
from lbr_ds.plan.shape import Shape, shape_of
from lbr_ds.plan.speed import ASSUMED, step_time, traffic_of
from lbr_ds.plan.work import num_steps, work_of
from lbr_ds.shards import Manifest
from lbr_ds.system import resources
from lbr_ds.system.urls import is_url


def make_plan(
    run: RunConfig,
    cluster: Cluster,
    config: Path | None = None,
    *,
    passages: int | None = None,
    queries: int | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Plan every shipped ds_config and the recipe's own.

    Args:
        run: the recipe.
        cluster: nodes and GPUs.
        config: the backbone's config.json, if it is not found by itself.
        passages: passages to encode and mine in; None: those of the prepared data, if there are.
        queries: queries to mine for; None: those of the prepared data, or as many as `passages`.
        tokens: of a text that is encoded; None: as many as the recipe allows.

    Returns:
        A dict that is ready for JSON. `best` names the ds_config that the rules of auto.py prefer
        for both stages together; None if none fits.

    Raises:
        ConfigError: the backbone's shape is not known, or the ranks cannot share a step.
    """
    shape = shape_of(run, config)
    rows = [_row(shape, name, run, cluster) for name in _names(run)]
    fitting = [row for row in rows if row["fits"] and row["suits"]]
    costs = [auto.Cost(r["offloads"], r["zero_stage"], r["step_seconds"]) for r in fitting]
    best = fitting[auto.cheapest(costs)] if fitting else None
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
        "assumed": {
            **ASSUMED,
            **pace.ASSUMED,
            "fill": fill(cluster.gpu),
            "reserve_gib": reserve(cluster.gpu) / GIB,
        },
        "layouts": rows,
        "recipe_layout": run.engine.ds_config,
        "best": best["ds_config"] if best else None,
        "auto": _automatic(run, shape, cluster),
        "encoding": _encoding(run, shape, cluster, passages, queries, tokens),
    }


def _encoding(
    run: RunConfig,
    shape: Shape,
    cluster: Cluster,
    passages: int | None,
    queries: int | None,
    tokens: int | None,
) -> dict[str, Any] | None:
    """Return what mining takes with vectors of a model of this shape; None: of unknown size."""
    counts = {name: _prepared(run, name) for name in {*run.mining.passages, "cl"}}
    if passages is None:
        known = [counts[name] for name in run.mining.passages]
        if None in known:
            return None
        passages = sum(count or 0 for count in known)
    queries = queries or counts["cl"] or passages
    corpus = Corpus(passages, queries, tokens or run.model.max_length)
    return plan_encoding(run, shape, cluster, corpus)


def _automatic(run: RunConfig, shape: Shape, cluster: Cluster) -> list[dict[str, Any]]:
    """Return what training chooses in each stage for the recipe's keys that are `auto`, if any."""
    found = []
    for number in STAGES:
        if auto.is_open(run, number):
            choice = auto.choose(run, number, shape, cluster)
            line = auto.describe(run, number, choice, cluster)
            found.append({"stage": number, **dataclasses.asdict(choice), "line": line})
    return found


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
        "suits": auto.suits(layout, cluster),
        "offloads": layout.offloads,
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

    For keys that are `auto` the values are taken that are best with this layout.

    Raises:
        ConfigError: the ranks cannot share a step.
    """
    if auto.is_open(run, number):
        engine = run.engine.model_copy(update={"ds_config": layout.name})
        named = run.model_copy(update={"engine": engine})
        run = auto.settled(named, number, auto.choose(named, number, shape, cluster))
    checkpointing = bool(run.model.activation_checkpointing)
    work, gpu = work_of(run, number, cluster.world), cluster.gpu
    with_, without = (
        memory_on(run, shape, layout, work, cluster, checkpointing=on) for on in (True, False)
    )
    reserved = reserve(gpu)
    memory = with_ if checkpointing else without
    time = step_time(shape, layout, work, cluster, checkpointing)
    traffic = traffic_of(shape, layout, work, cluster)
    steps = num_steps(run, number, _prepared(run, STAGES[number].split))
    peak = gpu.tflops * 1e12
    return {
        "stage": number,
        "reason": refusal(layout, memory, cluster),
        "gpu_gib": {
            "states": {part: size / GIB for part, size in memory.states.items()},
            "phases": {phase: size / GIB for phase, size in memory.phases.items()},
            "reserve": reserved / GIB,
            "peak": (memory.peak + reserved) / GIB,
            "peak_without_checkpointing": (without.peak + reserved) / GIB,
            "peak_with_checkpointing": (with_.peak + reserved) / GIB,
        },
        "host_gib_per_node": memory.host * cluster.per_node / GIB,
        "activation_checkpointing": checkpointing,
        "work": dataclasses.asdict(work),
        "traffic_gib": {
            **{way: size / GIB for way, size in dataclasses.asdict(traffic).items()},
            "total": traffic.total / GIB,
        },
        "seconds": dataclasses.asdict(time),
        "step_seconds": time.seconds,
        "tokens_per_second_per_gpu": sum(part.tokens for part in work.parts) / time.seconds,
        "mfu": sum(part.useful_flops(shape) for part in work.parts) / (time.seconds * peak),
        "steps": steps,
        "days": None if steps is None else steps * time.seconds / 86400,
    }


def _prepared(run: RunConfig, split: str) -> int | None:
    """Return the records of a split, if the data is prepared on this disk."""
    folder = run.data.folder
    if is_url(folder) or not (Path(folder) / "manifest.json").is_file():
        return None
    return Manifest.load(folder).records(split)
