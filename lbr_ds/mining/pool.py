"""cl (and gl) -> the distinct passages, the queries, and what can never be a query's negative."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.records import Record


@dataclass(frozen=True)
class Pool:
    """P passages that differ when normalised, and Q queries.

    told: the passages as a model trained on the data encodes them: after the document instruction
    of the first record that holds them. Every rule compares the bare ones.
    positives[q]: the passages that answer query q. barred[q]: sets of passages that are never its
    mined negatives; most are shared by many queries.
    """

    passages: list[str]
    told: list[str]
    queries: list[Record]
    positives: list[NDArray[np.int64]]
    barred: list[list[NDArray[np.int64]]]
    held_out: int  # passages left out since eval has them

    def banned(self, query: int) -> NDArray[np.int64]:
        """Return in ascending order the passages of the query's group (its positives among them),
        the query's own text, and the negatives that it came with."""
        return np.unique(np.concatenate(self.barred[query]))

    @classmethod
    def of(cls, asked: list[Record], others: Iterable[Record], judged: Iterable[Record]) -> Pool:
        """asked: the records that get negatives; others: more passages; judged: eval's records."""
        kept_out = {key(text) for record in judged for text in record.texts()}
        numbers: dict[bytes, int] = {}
        passages: list[str] = []
        told: list[str] = []
        of_group: dict[tuple[str, str], set[int]] = defaultdict(set)
        left_out: set[bytes] = set()
        for record in (*asked, *others):
            answers = {record.text, *record.positives}
            for text in dict.fromkeys([record.text, *record.positives, *record.negatives]):
                name = key(text)
                if not text or name in kept_out:
                    left_out |= {name} if text else set()
                    continue
                if name not in numbers:
                    numbers[name] = len(passages)
                    passages.append(text)
                    told.append(record.instructed_passage(text))
                if text in answers:
                    of_group[_group(record)].add(numbers[name])
        queries = [record for record in asked if record.query]
        positives = [_sorted(numbers.get(key(t), -1) for t in r.positives) for r in queries]
        groups = {group: _sorted(members) for group, members in of_group.items()}
        barred = []
        for record in queries:
            own = _sorted(numbers.get(key(t), -1) for t in (record.query, *record.negatives))
            group = groups.get(_group(record))
            barred.append([own] if group is None else [own, group])
        return cls(passages, told, queries, positives, barred, len(left_out))


def _group(record: Record) -> tuple[str, str]:
    """A record without a group is alone."""
    return ("group", record.group) if record.group else ("record", record.id)


def _sorted(numbers: Iterable[int]) -> NDArray[np.int64]:
    return np.array(sorted({n for n in numbers if n >= 0}), np.int64)
