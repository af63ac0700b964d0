"""No text of eval in gl or cl: negatives that would carry one over are removed, then all is proved.

Queries, positives and passages cannot cross, since components stay whole (`splits.py`). Negatives
are texts of others, so they can.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lbr_ds.config import SPLITS
from lbr_ds.corpora.cleaning import key
from lbr_ds.corpora.reading import Tally
from lbr_ds.corpora.splits import Component, own_texts
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards import read_split

TRAINED = tuple(name for name in SPLITS if name != "eval")


def part_negatives(splits: dict[str, list[Component]], removed: Tally) -> dict[str, list[Record]]:
    """The records of each split, without negatives that are an answer of their own group, that a
    trained split would share with eval, or eval with a trained split."""
    records = {
        name: [_apart_from_own(record, own, removed) for record, own in _with_answers(components)]
        for name, components in splits.items()
    }
    trained = {k for name in TRAINED for record in records[name] for k in _keys(record, False)}
    rule = "negative_is_in_other_split"
    records["eval"] = [_apart(record, trained, rule, removed) for record in records["eval"]]
    judged = {k for record in records["eval"] for k in _keys(record, True)}
    for name in TRAINED:
        records[name] = [_apart(record, judged, rule, removed) for record in records[name]]
    return records


def _with_answers(components: list[Component]) -> list[tuple[Record, set[bytes]]]:
    """Each record with the keys of all answers of its component; only where it has negatives."""
    found: list[tuple[Record, set[bytes]]] = []
    for component in components:
        own: set[bytes] = set()
        if any(record.negatives for record in component.records):
            own = {key(text) for record in component.records for text in record.positives}
        found.extend((record, own) for record in component.records)
    return found


def _apart_from_own(record: Record, own: set[bytes], removed: Tally) -> Record:
    return _apart(record, own, "negative_is_a_positive", removed)


def _apart(record: Record, banned: set[bytes], rule: str, removed: Tally) -> Record:
    if not record.negatives:
        return record
    kept = []
    for text in record.negatives:
        if key(text) in banned:
            removed.add(rule, f"{record.id}: {text}")
        else:
            kept.append(text)
    return replace(record, negatives=kept)


def _keys(record: Record, negatives: bool) -> set[bytes]:
    return set(map(key, record.texts() if negatives else own_texts(record)))


def prove(folder: Path) -> dict[str, int]:
    """Count the normalised texts that eval shares with gl and with cl, from the shards as written.

    Returns {"eval_gl": 0, "eval_cl": 0}; raises DataError when a count is not 0.
    """
    judged = {k for record in read_split(folder, "eval") for k in _keys(record, True)}
    shared: dict[str, int] = {}
    for name in TRAINED:
        found = {k for record in read_split(folder, name) for k in _keys(record, True)}
        shared[f"eval_{name}"] = len(judged & found)
    if any(shared.values()):
        raise DataError(f"{folder}: eval shares texts with training ({shared}); report this bug")
    return shared
