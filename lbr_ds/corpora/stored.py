"""Read records and texts from the files beside the store's database, in any process.

`seq` numbers the rows of all parts (`parts.py`); `num` numbers the distinct texts.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.store_files import ValueReader
from lbr_ds.records import Record
from lbr_ds.shards.writer import Lazy

# The roles of a text in a record. A negative does not link records that share it.
QUERY, POSITIVE, PASSAGE, NEGATIVE = range(4)
FIELDS = ("query", "positives", "text", "negatives")  # of the record, by role
# A use as one number (USE in SQL), which orders uses by record, role and place in the role.
ROLE_BIT, SEQ_BIT = 24, 28
USE = f"(seq::BIGINT << {SEQ_BIT}) | (role::BIGINT << {ROLE_BIT}) | place"
PLACES = np.dtype([("seq", "<i4"), ("role", "<i4"), ("place", "<i4")])  # of a text its first use
_AT_ONCE = 256  # records that are read at once
_OPEN = 64  # parts whose files a process keeps open


def roles(record: Record) -> Iterator[tuple[int, str, list[str]]]:
    """Yield (role, name of the field, texts) for each role of texts in a record."""
    for role, name in enumerate(FIELDS):
        value = getattr(record, name)
        yield role, name, value if isinstance(value, list) else [value] if value else []


def body_file(folder: Path, name: str) -> Path:
    """Return the file of the records of a part, as JSON."""
    return folder / f"{name}.bodies"


class Files:
    """Where the readers find the files of a store.

    Args:
        folder: The work folder.
    """

    def __init__(self, folder: Path) -> None:
        self.parts = folder / "parts"
        self.index = folder / "parts.json"  # the first seq of each part, and the names
        self.signatures = folder / "signatures"  # of all texts by num
        self.places = folder / "places"  # of each text, PLACES
        self.groups = folder / "groups"  # of each seq the number of its group's label, int32
        self.labels = folder / "labels"  # of the groups
        self.removed = folder / "removed"  # the uses that are not written, ascending, int64


class _Raw:
    """Reads a file at any place; it is opened when it is first read."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, -1

    def __call__(self, length: int, begin: int) -> bytes:
        # Not a memory map: its pages would count as memory of this process.
        if self._file < 0:
            self._file = os.open(self._path, os.O_RDONLY)
        return os.pread(self._file, length, begin)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class _Reader:
    """Reads records. A copy sent to another process opens the files again."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._index: tuple[list[int], list[str]] | None = None
        self._open: OrderedDict[str, ValueReader] = OrderedDict()

    def __reduce__(self) -> tuple[Any, tuple[Files]]:
        return type(self), (self._files,)

    def body(self, seq: int) -> bytes:
        """Return a record as JSON."""
        if self._index is None:
            self._index = json.loads(self._files.index.read_bytes())
        firsts, names = self._index
        part = bisect_right(firsts, seq) - 1
        return self._part(names[part])(seq - firsts[part])

    def _part(self, name: str) -> ValueReader:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = ValueReader(body_file(self._files.parts, name))
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        return self._open[name]

    def close(self) -> None:
        """Close this process's files."""
        while self._open:
            self._open.popitem()[1].close()


class Bodies(_Reader):
    """Returns records as they were read, without their groups."""

    def __call__(self, seq: int) -> Record:
        """Return a record."""
        return Record(**json.loads(self.body(seq)))


class Texts(_Reader):
    """Returns texts by their numbers."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._places = _Raw(files.places)

    def __call__(self, number: int) -> str:
        """Return a text."""
        raw = self._places(PLACES.itemsize, number * PLACES.itemsize)
        seq, role, place = np.frombuffer(raw, PLACES)[0].tolist()
        value = json.loads(self.body(seq))[FIELDS[role]]
        return str(value if isinstance(value, str) else value[place])

    def close(self) -> None:
        """Close this process's files."""
        super().close()
        self._places.close()


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Return the distinct values in ascending order; of many numbers faster than `np.unique`."""
    values = np.sort(values)
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return values[new]


class Records(_Reader):
    """Returns records as they will be written: with groups, and without the negatives that leak."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._removed: NDArray[np.int64] | None = None
        self._groups, self._labels = _Raw(files.groups), ValueReader(files.labels)

    def __call__(self, seqs: Sequence[int]) -> list[Record]:
        """Return the records with these numbers."""
        return [self._record(seq) for seq in seqs]

    def _record(self, seq: int) -> Record:
        fields = {**json.loads(self.body(seq)), "group": self._label(seq)}
        if self._removed is None:
            self._removed = np.fromfile(self._files.removed, np.int64)
        begin, end = np.searchsorted(self._removed, (seq << SEQ_BIT, (seq + 1) << SEQ_BIT))
        for use in self._removed[begin:end][::-1].tolist():
            place = use & ((1 << ROLE_BIT) - 1)
            for name in ("negatives", "negative_scores"):
                if name in fields:
                    del fields[name][place]
        return Record(**fields)

    def _label(self, seq: int) -> str:
        return self._labels(int.from_bytes(self._groups(4, 4 * seq), "little")).decode()

    def close(self) -> None:
        """Close this process's files."""
        super().close()
        self._groups.close()
        self._labels.close()


class Stored(Lazy):
    """Records of the store, each read when it is accessed."""

    def __init__(self, read: Records, seqs: array[int]) -> None:
        self._read, self.seqs = read, seqs

    def __len__(self) -> int:
        return len(self.seqs)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return self._read(self.seqs[place])
        return self._read([self.seqs[place]])[0]

    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self.seqs), _AT_ONCE):
            yield from self._read(self.seqs[first : first + _AT_ONCE])

    def part(self, places: Sequence[int]) -> Stored:
        """Return those of the records that are at `places`."""
        return Stored(self._read, array("q", (self.seqs[place] for place in places)))
