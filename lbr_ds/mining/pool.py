"""The distinct passages of cl (and gl), the queries, and what is excluded for each query."""

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

    Attributes:
        passages: The bare texts, which every rule compares.
        instructed: The passages as a model trained on the data encodes them: with the document
            instruction of the first record that holds them.
        queries: The records that get negatives.
        positives: For each query the passages that answer it.
        excluded: For each query sets of passages that are never its negatives; most are shared by
            many queries.
        held_out: The number of passages left out because eval has them.
    """

    passages: list[str]
    instructed: list[str]
    queries: list[Record]
    positives: list[NDArray[np.int64]]
    excluded: list[list[NDArray[np.int64]]]
    held_out: int

    def banned(self, query: int) -> NDArray[np.int64]:
        """Return the sorted numbers of the passages that are never this query's negatives.

        These are the passages of its group (its positives among them), the query's own text, and
        the negatives that the record came with.
        """
        return np.unique(np.concatenate(self.excluded[query]))

    @classmethod
    def of(
        cls, targets: list[Record], others: Iterable[Record], held_out: Iterable[Record]
    ) -> Pool:
        """Build the pool.

        Args:
            targets: The records that get negatives.
            others: Records with further passages.
            held_out: Records whose texts are no candidates.
        """
        kept_out = {key(text) for record in held_out for text in record.texts()}
        numbers: dict[bytes, int] = {}
        passages: list[str] = []
        instructed: list[str] = []
        of_group: dict[tuple[str, str], set[int]] = defaultdict(set)
        left_out: set[bytes] = set()
        for record in (*targets, *others):
            answers = {record.text, *record.positives}
            for text in dict.fromkeys([record.text, *record.positives, *record.negatives]):
                name = key(text)
                if not text or name in kept_out:
                    left_out |= {name} if text else set()
                    continue
                if name not in numbers:
                    numbers[name] = len(passages)
                    passages.append(text)
                    instructed.append(record.instructed_passage(text))
                if text in answers:
                    of_group[_group(record)].add(numbers[name])
        queries = [record for record in targets if record.query]
        positives = [_sorted(numbers.get(key(t), -1) for t in r.positives) for r in queries]
        groups = {group: _sorted(members) for group, members in of_group.items()}
        excluded = []
        for record in queries:
            own = _sorted(numbers.get(key(t), -1) for t in (record.query, *record.negatives))
            group = groups.get(_group(record))
            excluded.append([own] if group is None else [own, group])
        return cls(passages, instructed, queries, positives, excluded, len(left_out))


def _group(record: Record) -> tuple[str, str]:
    """Return a record's group; a record without one is a group of its own."""
    return ("group", record.group) if record.group else ("record", record.id)


def _sorted(numbers: Iterable[int]) -> NDArray[np.int64]:
    return np.array(sorted({n for n in numbers if n >= 0}), np.int64)
