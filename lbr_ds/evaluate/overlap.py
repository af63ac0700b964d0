"""A model of ours and the tasks -> a refusal when the model was trained on their texts.

Checkpoints and exports carry the hashes of their training texts (`corpora/overlap.py`). Asked are
the queries and the passages that answer them, normalised; a model without hashes is not asked.

Under protocol knowledge gl states facts of what eval asks, and may do so in eval's own words. So a
model of that very data is not asked for its eval, of which `prepare` has proved that nothing is in
cl; for its control it is, and so is any other model for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask

from lbr_ds import runs
from lbr_ds.corpora import overlap
from lbr_ds.errors import DataError
from lbr_ds.evaluate.tasks import HeldOutTask

_EXAMPLES, _CHARS = 2, 60


def check_overlap(
    model: str, tasks: Sequence[AbsTask], allow: bool, fetch: Callable[[AbsTask], None]
) -> dict[str, Any]:
    """How many texts of each retrieval task `model` was trained on; {} when none is.

    fetch: loads a task's texts. Raises DataError that names the numbers, two of the texts and the
    cure, unless `allow`.
    """
    trained = trained_texts(model)
    found: dict[str, Any] = {}
    for task in tasks if trained else ():
        fetch(task)
        assert trained is not None
        if isinstance(task, HeldOutTask) and task.told_by == trained.prepared:
            continue
        counts, examples = _shared(task, trained)
        if not isinstance(task, HeldOutTask):
            task.unload_data()  # scoring loads it again; many tasks at once would fill the memory
        if not any(shared for shared, _ in counts.values()):
            continue
        if not allow:
            told = " and ".join(f"{n} of {total} {kind}" for kind, (n, total) in counts.items())
            raise DataError(
                f"{model} was trained on texts of {task.metadata.name}: {told}, such as "
                f"{' and '.join(map(repr, examples))} (data {trained.fingerprint}); score it on "
                "texts that it has not seen, or add --allow-overlap"
            )
        found[task.metadata.name] = {kind: n for kind, (n, _) in counts.items()}
    return found


def trained_texts(model: str) -> overlap.TrainedTexts | None:
    """The training texts of a run, a checkpoint or an export of ours; None for any other model."""
    found = runs.find_model(model)
    return overlap.load(found.folder) if found.ours and found.folder else None


def _shared(
    task: AbsTask, trained: overlap.TrainedTexts
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """{"queries": (shared, all), "passages": (shared, all)} and examples of what is shared."""
    texts: dict[str, set[str]] = {"queries": set(), "passages": set()}
    for part in getattr(task.metadata, "tasks", [task]):  # an aggregate is made of tasks
        if isinstance(part, AbsTaskRetrieval):
            for kind, own in _texts(part):
                texts[kind].update(own)
    counts, examples = {}, []
    for kind, own in texts.items():
        ordered = sorted(own)
        shared = [t for t, seen in zip(ordered, trained.holds(ordered), strict=True) if seen]
        counts[kind] = (len(shared), len(ordered))
        examples += shared[:_EXAMPLES]
    return counts, [text[:_CHARS] for text in examples[:_EXAMPLES]]


def _texts(task: AbsTaskRetrieval) -> Iterator[tuple[str, Iterable[str]]]:
    """The queries that are asked and the passages that answer one of them."""
    for subset in task.dataset.values():
        for data in subset.values():
            answers = {i for right in data["relevant_docs"].values() for i, n in right.items() if n}
            yield "queries", (text for text in data["queries"]["text"] if isinstance(text, str))
            corpus = zip(data["corpus"]["id"], data["corpus"]["text"], strict=True)
            yield "passages", (text for i, text in corpus if i in answers)
