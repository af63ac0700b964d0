"""Records of a split with mined negatives or scores added, by the process that writes a shard."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lbr_ds.mining.pairs import Pairs
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.stored import Lists, StoredTexts
from lbr_ds.records import Record
from lbr_ds.shards import Manifest
from lbr_ds.shards.reader import Tars, decode
from lbr_ds.shards.writer import Lazy

_OPENED = ("_tars", "_ends")  # belong to one process


class Remade(Lazy):
    """Records of a split in some order, each with something added.

    Args:
        folder: The prepared folder.
        split: The split with the records as they were.
        added: What is added, by the number of the record.
        numbers: The records.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        added: Lists | Mapping[int, NDArray[Any]],
        numbers: Sequence[int],
    ) -> None:
        self.folder, self.split, self.added, self.numbers = folder, split, added, numbers

    @abstractmethod
    def add(self, record: Record, added: NDArray[Any]) -> Record:
        """Return a record with what is added to it."""

    def part(self, places: Sequence[int]) -> Self:
        """Return those at `places`."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.numbers = array("q", (self.numbers[place] for place in places))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs: what is added to these records, and no open file."""
        own = {number: self.added[number] for number in self.numbers}
        kept = {name: value for name, value in self.__dict__.items() if name not in _OPENED}
        return {**kept, "added": own}

    @cached_property
    def _tars(self) -> Tars:
        return Tars(Manifest.load(self.folder), self.split)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """The number after the last record of each shard."""
        return np.cumsum([shard.records for shard in self._tars.shards])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        """Return the record at a place."""
        number = self.numbers[place]
        shard = int(np.searchsorted(self._ends, number, "right"))
        row = number - (int(self._ends[shard - 1]) if shard else 0)
        record = decode(self._tars.read(shard, row), self._tars.where(shard, row))
        added = self.added[number]
        return self.add(record, added) if len(added) else record


def _by_record(lists: Lists, chosen: NDArray[np.int64]) -> tuple[Lists, range]:
    """Return a list for each record, empty for those that are not chosen, and their numbers."""
    counts = np.zeros(len(chosen), np.int64)
    counts[np.asarray(chosen) >= 0] = np.diff(lists.ends, prepend=0)
    return Lists(lists.items, np.cumsum(counts)), range(len(chosen))


class Mined(Remade):
    """Mined negatives after the given ones; they have no score of a teacher's."""

    passages: StoredTexts

    @classmethod
    def of(cls, folder: Path, split: str, pool: Pool, negatives: Lists) -> Mined:
        """Return the records of a split with the negatives of each query of the pool."""
        made = cls(folder, split, *_by_record(negatives, pool.query_of))
        made.passages = pool.passages
        return made

    def add(self, record: Record, added: NDArray[Any]) -> Record:
        """Return a record with these passages as further negatives."""
        found = [self.passages[passage] for passage in added.tolist()]
        return replace(record, negatives=record.negatives + found, negative_scores=[])


class Scored(Remade):
    """A teacher's scores in place of any others: of the positives, then of the negatives."""

    @classmethod
    def of(
        cls, folder: Path, split: str, pairs: Pairs, scores: NDArray[np.float32] | None
    ) -> Scored:
        """Return the records of a split with the scores of their pairs; None: as they are."""
        lists = Lists(np.empty(0), np.zeros(len(pairs), np.int64))
        if scores is not None:
            lists = Lists(scores, pairs.passages_of.ends)
        return cls(folder, split, *_by_record(lists, pairs.pairs_of))

    def add(self, record: Record, added: NDArray[Any]) -> Record:
        """Return a record with these scores."""
        scores = [round(score, 6) for score in added.tolist()]
        count = len(record.positives)
        return replace(record, positive_scores=scores[:count], negative_scores=scores[count:])
