"""Compare the evaluations of one run: scores, gain over the base, and significance."""

from __future__ import annotations

from typing import Any

from lbr_ds.config import STAGES
from lbr_ds.evaluation import bootstrap
from lbr_ds.report.by_source import held_out

METRICS = {"recall_at_10": "Recall@10", "ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10"}
LABELS = {
    "base": "Base model",
    **{stage.folder: f"After {stage.title}" for stage in STAGES.values()},
}

# Table 3 of the paper: nDCG@10 of LLM, LLM + IB-GL, LLM + IB-GL + CL, on Qwen2-1.5B.
PAPER = {"medical": (0.335, 0.806, 0.899), "code": (0.108, 0.733, 0.882)}


def compare(evals: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One table a task, in the order in which the evaluations name them.

    Returns [{"task", "about", "queries", "documents", "rows": [{"key", "label", <metric>, "gain"}],
    "pairs": {"better", "worse", "same", "gain", "low", "high", "p"} or None, "mixed",
    "compressed": rows of `evaluation/compression.py` of the last model, "by_source": see
    `by_source.held_out`, "by_bottleneck": rows of `evaluation/by_bottleneck.py`, for the held-out
    task}]. about: the protocol, and which of its tasks it is; mixed: the rows were judged on
    different numbers of queries or passages. gain: nDCG@10 against the base; pairs: the last
    trained model against the base, query by query.
    """
    names = dict.fromkeys(task for result in evals.values() for task in result.get("tasks", {}))
    return [_table(task, evals) for task in names]


def _table(task: str, evals: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {key: e["tasks"][task] for key, e in evals.items() if task in e.get("tasks", {})}
    base = found.get("base", {}).get("ndcg_at_10")
    rows = []
    for key, scores in found.items():
        row: dict[str, Any] = {"key": key, "label": LABELS[key]}
        row |= {metric: scores.get(metric) for metric in METRICS}
        if "main_score" in scores:
            row |= {"main_score": scores["main_score"], "metric": scores.get("metric")}
        ours = scores.get("ndcg_at_10")
        row["gain"] = ours - base if key != "base" and None not in (ours, base) else None
        rows.append(row)
    last = next(reversed(found.values()))
    trained = next((key for key in ("stage2", "stage1") if key in found), None)
    pairs = None
    if trained and "base" in found:
        ours, theirs = (evals[k].get("per_query", {}).get(task, {}) for k in (trained, "base"))
        pairs = pair(ours, theirs)
    sizes = {"queries": last.get("queries"), "documents": last.get("documents")}
    different = {(scores.get("queries"), scores.get("documents")) for scores in found.values()}
    return {
        "task": task,
        "about": _about(task, evals),
        **sizes,
        "rows": rows,
        "pairs": pairs,
        "mixed": len(different) > 1,
        "compressed": last.get("compressed", []),
        "by_source": held_out(found),
        "by_bottleneck": _by_bottleneck(task, evals[list(found)[-1]]),
    }


def _by_bottleneck(task: str, last: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows by the number of bottleneck tokens; they are of the first held-out task."""
    first = next(iter(last.get("per_query", {})), None)
    return list(last.get("bottleneck", [])) if task == first else []


def _about(task: str, evals: dict[str, dict[str, Any]]) -> str:
    """Return the protocol by which the task's texts were held out; "" for official tasks."""
    for result in evals.values():
        tasks = list(result.get("per_query", {}))
        if task in tasks and "protocol" in result:
            which = ("", ", known from stage 1 only", ", control: in no training split")
            known = 1 + tasks.index(task) if len(tasks) > 1 else 0
            return f"{result['protocol'].capitalize()}{which[known]}."
    return ""


def pair(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any] | None:
    """Query by query: how many got better or worse, and the mean gain with its 95 % interval and p.

    Over the queries that both have, by `evaluation/bootstrap.py`. None below 2 such queries.
    """
    found = bootstrap.compare(ours, theirs)
    if found is None:
        return None
    gains = [ours[i] - theirs[i] for i in ours if i in theirs]
    return {
        "better": sum(gain > 1e-9 for gain in gains),
        "worse": sum(gain < -1e-9 for gain in gains),
        "same": sum(abs(gain) <= 1e-9 for gain in gains),
        "gain": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p,
    }
