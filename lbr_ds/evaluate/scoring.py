"""Score one task by `mteb.evaluate`, and measure the vectors that its search used.

The corpus is encoded once for the scores, the geometry and a second task over the same documents.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mteb
import numpy as np
import torch
from mteb.abstasks.abstask import AbsTask
from mteb.models import MTEBModels

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.evaluate import geometry
from lbr_ds.evaluate.models import OwnModel
from lbr_ds.evaluate.tasks import HeldOutTask

METRICS = ("recall_at_10", "ndcg_at_10", "mrr_at_10")


def score_task(
    encoder: MTEBModels,
    task: AbsTask,
    batch_size: int = 64,
    show: bool | None = None,
    known: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """One task's scores by mteb, with no result cache; averaged over splits and languages.

    For our own task the vectors are measured too, those that mteb's search asked for.
    show: progress bars; None: where there is a terminal. known: vectors of our own documents by id,
    used in place of encoding; those that are not there yet are put in.
    Raises EnvironmentProblem when the task's texts cannot be fetched.
    """
    fetch(task)
    show = sys.stderr.isatty() if show is None else show
    with recorded(encoder, task if isinstance(task, HeldOutTask) else None, known) as seen:
        outcome = mteb.evaluate(
            encoder,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=show,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show},
        )
    rows = [row for split in outcome.task_results[0].scores.values() for row in split]
    metrics = [m for m in METRICS if all(m in row for row in rows)]
    scores: dict[str, Any] = {m: round(float(np.mean([r[m] for r in rows])), 5) for m in metrics}
    if not metrics:
        scores["main_score"] = round(float(np.mean([r["main_score"] for r in rows])), 5)
        scores["metric"] = task.metadata.main_score
    scores |= _sizes(task)
    if not isinstance(task, HeldOutTask):
        task.unload_data()
    elif all(seen.values()):
        scores |= _geometry(task, seen)
    return scores


@contextlib.contextmanager
def recorded(
    encoder: Any, task: HeldOutTask | None, documents: dict[str, np.ndarray] | None = None
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """While mteb searches, keep what `encoder` answers: {"query" or "document": {id: vector}}.

    task: one of our own; None: nothing is kept. A model of ours gets its texts with their
    instructions here. documents: what is known of them already, see `score_task`. So the corpus is
    encoded once for scores, geometry and a second task. Models that are no encoders of single
    vectors (BM25, late interaction) leave nothing here.
    """
    seen = {"query": dict[str, np.ndarray](), "document": {} if documents is None else documents}
    encode: Callable[..., Any] | None = getattr(encoder, "encode", None) if task else None
    told = task if isinstance(encoder, OwnModel) else None

    def record(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert encode is not None
        side = kwargs["prompt_type"].value
        known = seen[side]
        if known and all(i in known for i in inputs.dataset["id"]):
            return np.stack([known[i] for i in inputs.dataset["id"]])
        if told is not None:
            kwargs["instructed"] = told.texts(side, inputs.dataset["id"])
        vectors = encode(inputs, *args, **kwargs)
        rows = torch.as_tensor(vectors).float().cpu().numpy()
        if rows.ndim == 2:
            known.update(zip(inputs.dataset["id"], rows, strict=True))
        return vectors

    if encode is not None:
        encoder.encode = record
    try:
        yield seen
    finally:
        if encode is not None:
            del encoder.encode  # the class's own is in sight again


def _geometry(task: HeldOutTask, seen: dict[str, dict[str, np.ndarray]]) -> dict[str, float | None]:
    """`geometry.measure` of the vectors that were seen."""
    judged = task.judged
    return geometry.measure(
        np.stack([seen["query"][i] for i in judged.queries]),
        np.stack([seen["document"][i] for i in judged.documents]),
        *judged.places(),
    )


def fetch(task: AbsTask) -> None:
    """Load the texts here, so that a missing network is told apart from a fault in scoring."""
    for part in getattr(task.metadata, "tasks", [task]):  # an aggregate is made of tasks
        try:
            part.load_data()
        except Exception as error:  # datasets, huggingface_hub and httpx each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise EnvironmentProblem(
                f"cannot fetch the texts of task {part.metadata.name}: {reason} "
                "(the network, or a local copy in the Hugging Face cache, is needed)"
            ) from error


def _sizes(task: AbsTask) -> dict[str, int | None]:
    """Number of queries and documents: counted for our own task, else as mteb's tables say."""
    if isinstance(task, HeldOutTask):
        judged = task.judged
        return {"queries": len(judged.queries), "documents": len(judged.documents)}
    tables: dict[str, Any] = dict(task.metadata.descriptive_stats or {})
    splits = [tables[name] for name in task.eval_splits if name in tables]

    def total(key: str) -> int | None:
        counts = [split[key] for split in splits if key in split]
        return sum(counts) if counts else None

    return {"queries": total("num_queries"), "documents": total("num_documents")}
