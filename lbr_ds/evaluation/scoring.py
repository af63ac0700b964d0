"""Score one task by `mteb.evaluate`, and measure the vectors that its search used.

The corpus is encoded once for the scores, the geometry and a second task over the same documents.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import mteb
import numpy as np
import torch
from mteb.abstasks.abstask import AbsTask
from mteb.models import MTEBModels

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.evaluation import geometry
from lbr_ds.evaluation.documents import Documents
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.models import OwnModel
from lbr_ds.evaluation.tasks import HeldOutTask


class Seen(TypedDict):
    """Vectors by id."""

    query: dict[str, np.ndarray]
    document: Documents


Measure = Callable[[np.ndarray, np.ndarray, Judgements], dict[str, Any]]
METRICS = ("recall_at_10", "ndcg_at_10", "mrr_at_10")


def score_task(
    encoder: MTEBModels,
    task: AbsTask,
    batch_size: int = 64,
    show: bool | None = None,
    known: Documents | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Score one task by mteb, without its result cache; averaged over splits and languages.

    Args:
        encoder: The model.
        task: A held-out task, whose vectors are measured too, or an official one.
        batch_size: Texts per forward pass of sentence-transformers models.
        show: Whether to show mteb's progress bars; None: on a terminal.
        known: Vectors of held-out documents that need no encoding; new ones are added. If it does
            not keep them, only mteb's scores are computed, and they mean nothing.
        measure: `measure(queries, documents, judgements)` returns further scores of the vectors of
            a held-out task.

    Returns:
        Scores, "queries" and "documents", as `evaluate` describes them.

    Raises:
        EnvironmentProblem: The texts of the task cannot be downloaded.
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
        return scores
    scores |= {"by_source": parts} if (parts := task.by_source()) else {}
    if all(seen.values()) and seen["document"].keep:
        queries = np.stack([seen["query"][i] for i in task.judged.queries])
        documents = seen["document"].rows(list(task.judged.documents))
        own = task.judged.document_indices()
        scores |= geometry.measure(queries, documents, *own)
        scores |= measure(queries, documents[:], task.judged) if measure else {}
    return scores


@contextlib.contextmanager
def recorded(
    encoder: Any, task: HeldOutTask | None, documents: Documents | None = None
) -> Iterator[Seen]:
    """Record the vectors that `encoder` returns: {"query" or "document": {id: vector}}.

    An lbr-ds model gets the texts of a held-out task with their instructions. Models without one
    vector per text (BM25, late interaction) record nothing.

    Args:
        encoder: The model; its `encode` is replaced meanwhile.
        task: A held-out task; None: record nothing.
        documents: Vectors that are known already, see `score_task`.
    """
    seen: Seen = {"query": {}, "document": Documents() if documents is None else documents}
    encode: Callable[..., Any] | None = getattr(encoder, "encode", None) if task else None
    instructed = task if isinstance(encoder, OwnModel) else None

    def record(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert encode is not None
        side, ids = kwargs["prompt_type"].value, list(inputs.dataset["id"])
        known = seen["document"]
        if side == "document" and known and all(i in known for i in ids):
            return known.rows(ids)[:]
        if instructed is not None:
            kwargs["instructed"] = instructed.texts(side, ids)
        vectors = encode(inputs, *args, **kwargs)
        rows = torch.as_tensor(vectors).float().cpu().numpy()
        if rows.ndim == 2 and side == "document":
            known.add(ids, rows)
        elif rows.ndim == 2:
            seen["query"].update(zip(ids, rows, strict=True))
        return vectors

    if encode is not None:
        encoder.encode = record
    try:
        yield seen
    finally:
        if encode is not None:
            del encoder.encode  # uncovers the method of the class


def fetch(task: AbsTask) -> None:
    """Load the texts of a task, so that a missing network is not taken for a fault in scoring."""
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
    """Return the numbers of queries and documents; of an official task those of mteb's tables."""
    if isinstance(task, HeldOutTask):
        judged = task.judged
        return {"queries": len(judged.queries), "documents": len(judged.documents)}
    tables: dict[str, Any] = dict(task.metadata.descriptive_stats or {})
    splits = [tables[name] for name in task.eval_splits if name in tables]

    def total(key: str) -> int | None:
        counts = [split[key] for split in splits if key in split]
        return sum(counts) if counts else None

    return {"queries": total("num_queries"), "documents": total("num_documents")}
