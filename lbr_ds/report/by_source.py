"""What each source contributed to a run: samples, epochs, tokens, losses."""

from __future__ import annotations

import math
import statistics
from typing import Any

from lbr_ds.config import STAGES
from lbr_ds.report.collect import Run, Stage
from lbr_ds.report.reading import number
from lbr_ds.shards.sources import OTHERS

_ENDS = 10  # logged values averaged for a last value


def sources_of(stage: Stage) -> list[str]:
    """Return the sources with metrics of their own, by name."""
    prefix = "samples/"
    found = {key for row in stage.rows for key in row if key.startswith(prefix)}
    return sorted(key.removeprefix(prefix) for key in found)


def contributions(run: Run) -> list[dict[str, Any]]:
    """Return a table for each stage that was trained on several sources.

    [{"stage", "exact", "rows": [{"source", "weight", "temperature", "records", "samples", "share",
    "epochs", "tokens", "loss", "accuracy"}]}]. exact: every step was logged; if not, samples and
    tokens are scaled to all steps. loss and accuracy: means over the last logged steps.
    """
    tables = []
    for stage in run.stages:
        if names := sources_of(stage):
            rows = [_row(run, stage, name, names) for name in names]
            exact = len(stage.rows) == stage.rows[-1]["step"]
            tables.append({"stage": stage.number, "exact": exact, "rows": rows})
    return tables


def held_out(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores of the queries of each source, as one task has them in each evaluation.

    Args:
        found: The scores of the task by evaluation ("base", "stage1", "stage2").

    Returns:
        [{"source", "queries", "scores": {evaluation: {"recall_at_10", "ndcg_at_10"}}}].
    """
    names = dict.fromkeys(name for scores in found.values() for name in scores.get("by_source", {}))
    rows = []
    for name in names:
        own = {k: s["by_source"][name] for k, s in found.items() if name in s.get("by_source", {})}
        queries = next(reversed(own.values()))["queries"]
        rows.append({"source": name, "queries": queries, "scores": own})
    return rows


def _row(run: Run, stage: Stage, name: str, names: list[str]) -> dict[str, Any]:
    total = stage.rows[-1].get("samples") or 0
    logged = {n: _sum(stage, f"samples/{n}") for n in names}
    scale = total / sum(logged.values()) if sum(logged.values()) else math.nan
    samples, records = logged[name] * scale, _records(run, stage, name, names)
    recipe = {s["name"]: s for s in ((run.recipe or {}).get("data") or {}).get("sources", [])}
    rule = recipe.get(name, {})
    return {
        "source": name,
        "weight": rule.get("weight"),
        "temperature": rule.get("temperature") if stage.number == 2 else None,
        "records": records,
        "samples": samples,
        "share": samples / total if total else None,
        "epochs": samples / records if records else None,
        "tokens": _sum(stage, f"tokens/{name}") * scale,
        "loss": _last(stage, f"loss/{name}"),
        "accuracy": _last(stage, f"accuracy/{name}"),
    }


def _records(run: Run, stage: Stage, name: str, names: list[str]) -> int | None:
    """Return how many records of the stage's split are of a source; None: not known."""
    split = STAGES[stage.number].split
    counted: dict[str, int] = next(
        (s["by_source"] for s in run.data.get("splits", ()) if s["name"] == split), {}
    )
    if name == OTHERS:
        return sum(n for source, n in counted.items() if source == OTHERS or source not in names)
    return counted.get(name)


def _sum(stage: Stage, key: str) -> float:
    return math.fsum(v for row in stage.rows if math.isfinite(v := number(row.get(key))))


def _last(stage: Stage, key: str) -> float | None:
    values = [v for row in stage.rows if math.isfinite(v := number(row.get(key)))]
    return statistics.fmean(values[-_ENDS:]) if values else None
