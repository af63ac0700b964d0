"""Refuse to score an lbr-ds model on texts that it was trained on.

Checkpoints and exports carry hashes of the texts of every dataset that they were trained on, in all
stages so far (`corpora/curate/trained_texts.py`). The queries of a task and the passages that
answer them are looked up, normalised. A model without hashes is not checked; a dataset of its
history whose hashes are missing is named in the log.

Under protocol knowledge, gl states facts about the queries of eval, possibly in the same words. So
the training texts of that data are ignored for its own eval, which shares no text with cl, as
`prepare` verified. They count for its control, and the model's other data counts for both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask

from lbr_ds import lineage, runs
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.errors import DataError
from lbr_ds.evaluation.tasks import HeldOutTask

log = logging.getLogger(__name__)
_EXAMPLES, _CHARS = 2, 60


def check_overlap(
    model: str, tasks: Sequence[AbsTask], allow: bool, fetch: Callable[[AbsTask], None]
) -> dict[str, Any]:
    """Count the texts of each retrieval task that `model` was trained on.

    Args:
        model: As for `load_model`.
        tasks: The tasks that will be scored.
        allow: Whether overlap is allowed.
        fetch: Loads a task's texts.

    Returns:
        {task: {"queries", "passages"}} of the tasks with overlap.

    Raises:
        DataError: There is overlap and `allow` is false.
    """
    trained = texts_trained_on(model)
    overlap: dict[str, Any] = {}
    for task in tasks if trained else ():
        facts_in = task.facts_in if isinstance(task, HeldOutTask) else ""
        seen = [texts for texts in trained if not facts_in or texts.prepared != facts_in]
        if not seen:
            continue
        fetch(task)
        counts, examples, data = _shared(task, seen)
        if not isinstance(task, HeldOutTask):
            task.unload_data()  # scoring loads it again; many tasks at once would fill the memory
        if not any(shared for shared, _ in counts.values()):
            continue
        if not allow:
            shares = " and ".join(f"{n} of {total} {kind}" for kind, (n, total) in counts.items())
            raise DataError(
                f"{model} was trained on texts of {task.metadata.name}: {shares}, such as "
                f"{' and '.join(map(repr, examples))} (data {', '.join(data)}); score it on "
                "texts that it has not seen, or add --allow-overlap"
            )
        overlap[task.metadata.name] = {kind: n for kind, (n, _) in counts.items()}
    return overlap


def texts_trained_on(model: str) -> list[trained_texts.TrainedTexts]:
    """Return the hashed training texts of an lbr-ds model, one entry per dataset.

    Empty for any other model. Datasets without hashes are named in the log.
    """
    place = runs.resolve_model(model)
    if place.folder is None or not place.ours:
        return []
    found = trained_texts.load(place.folder)
    known = {texts.prepared for texts in found}
    history = lineage.load(place.folder)
    for data in history.datasets if history else ():
        if data.prepared not in known:
            log.warning(
                "%s was trained on data %s (%s), whose hashes are not in its %s, so overlap with "
                "that data is not checked",
                model,
                data.fingerprint,
                data.name,
                trained_texts.NAME,
            )
    return found


def _shared(
    task: AbsTask, trained: Sequence[trained_texts.TrainedTexts]
) -> tuple[dict[str, tuple[int, int]], list[str], list[str]]:
    """Return what a task shares with training texts.

    Returns:
        {"queries": (shared, all), "passages": (shared, all)}, examples of shared texts, and the
        fingerprints of the data that holds them.
    """
    texts: dict[str, set[str]] = {"queries": set(), "passages": set()}
    for part in getattr(task.metadata, "tasks", [task]):  # an aggregate is made of tasks
        if isinstance(part, AbsTaskRetrieval):
            for kind, own in _texts(part):
                texts[kind].update(own)
    counts, examples, data = {}, [], set()
    for kind, own in texts.items():
        ordered = sorted(own)
        seen = np.zeros(len(ordered), bool)
        for part in trained:
            held = part.holds(ordered)
            data |= {part.fingerprint} if held.any() else set()
            seen |= held
        shared = [text for text, is_seen in zip(ordered, seen, strict=True) if is_seen]
        counts[kind] = (len(shared), len(ordered))
        examples += shared[:_EXAMPLES]
    return counts, [text[:_CHARS] for text in examples[:_EXAMPLES]], sorted(data)


def _texts(task: AbsTaskRetrieval) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the queries, and the passages that answer one of them."""
    for subset in task.dataset.values():
        for data in subset.values():
            answers = {i for right in data["relevant_docs"].values() for i, n in right.items() if n}
            yield "queries", (text for text in data["queries"]["text"] if isinstance(text, str))
            corpus = zip(data["corpus"]["id"], data["corpus"]["text"], strict=True)
            yield "passages", (text for i, text in corpus if i in answers)
