"""Add to a sweep's rows what follows from them: MFU, the plan's figures, scaling efficiency."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lbr_ds.config import RunConfig, load
from lbr_ds.config import ds_config as layouts
from lbr_ds.errors import ConfigError
from lbr_ds.plan import Cluster, Gpu, find_gpu, predict
from lbr_ds.plan.gpus import gpu_of_device
from lbr_ds.plan.shape import Shape, shape_of

if TYPE_CHECKING:
    from lbr_ds.cluster.benchmark import Sweep

log = logging.getLogger(__name__)


def derive(result: dict[str, Any], sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """Add `gpu` to the result, and three keys to each row of training.

    mfu: model FLOPs by the strict count (plan/flops.py) over the GPU's dense bf16 peak; None if
    the GPU is not known or the FLOPs were not counted. planned: step_seconds,
    tokens_per_second_per_rank, mfu, memory_gib and exposed_share by `lbr-ds plan`, which assumes
    texts as long as the recipe allows; None likewise.
    weak, strong: a rank's rate over that on the fewest ranks with the same samples per rank, or per
    step; None if there is nothing to compare with.
    """
    devices = [row["figures"]["device"] for row in result["rows"] if row["figures"]]
    gpu = find_gpu(sweep.gpu) if sweep.gpu else gpu_of_device(devices[0]) if devices else None
    result["gpu"] = None if gpu is None else gpu.model_dump()
    shape = _shape(run) if gpu else None
    rows = [row for row in result["rows"] if row["kind"] == "training"]
    for row in rows:
        row["mfu"] = row["planned"] = None
        if gpu and row["figures"] and (rate := row["figures"]["flops_per_second_per_rank"]):
            row["mfu"] = rate / (gpu.tflops * 1e12)
        if gpu and shape:
            row["planned"] = _planned(row, sweep, shape, gpu)
        row["weak"] = _efficiency(row, rows, lambda r: r["samples"] / r["ranks"])
        row["strong"] = _efficiency(row, rows, lambda r: r["samples"])
    return result


def _shape(run: RunConfig) -> Shape | None:
    try:
        return shape_of(run)
    except ConfigError as error:
        log.warning("no plan beside the figures: %s", error)
        return None


def _planned(row: dict[str, Any], sweep: Sweep, shape: Shape, gpu: Gpu) -> dict[str, Any] | None:
    """Return the plan's figures for a row; None without a plan."""
    stage, used = sweep.stage, {**row, **(row["figures"] or {})}  # what `auto` was
    keys = [
        f"stage{stage}.samples_per_step={row['samples']}",
        f"stage{stage}.micro_batch_tokens={used['micro_batch_tokens']}",
    ]
    try:
        run = load(sweep.recipe, [*sweep.overrides, *keys])
        layout = layouts.load(used["ds_config"])
        plan = predict(shape, layout, run, Cluster(row["nodes"], row["per_node"], gpu), stage)
    except ConfigError:
        return None
    return {
        "step_seconds": plan["step_seconds"],
        "tokens_per_second_per_rank": plan["tokens_per_second_per_gpu"],
        "mfu": plan["mfu"],
        "memory_gib": plan["gpu_gib"]["peak"] - plan["gpu_gib"]["reserve"],
        "exposed_share": plan["seconds"]["exposed"] / plan["step_seconds"],
    }


def _efficiency(row: dict[str, Any], rows: list[dict[str, Any]], alike: Any) -> float | None:
    """Return the rate of a row over that of the fewest ranks among comparable rows, if any."""
    keys = ("micro_batch_tokens", "ds_config")
    like = [
        r
        for r in rows
        if r["value"] and all(r[k] == row[k] for k in keys) and alike(r) == alike(row)
    ]
    if not row["value"] or len({r["ranks"] for r in like}) < 2:
        return None
    least: float = min(like, key=lambda r: r["ranks"])["value"]
    return float(row["value"]) / least
