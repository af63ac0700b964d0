"""Rows of numbers on disk, in blocks of 1,024 that are mapped into memory when they are read.

A set is stored in `FOLDER/00000.npy` ... A block appears in one rename.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.system.atomic import atomic_file

_MAPPED = 256  # blocks
ROWS = 1024  # of a block; a killed run may lose one


class Vectors:
    """(count, D) float32 of unit rows on disk; block i holds the rows from i * ROWS.

    A block is mapped when it is needed and at most 256 stay mapped: a process may have 65,530
    mappings (Linux), and 100 million vectors are 97,657 blocks.
    """

    def __init__(self, folder: Path, count: int) -> None:
        """Refer to the blocks of `folder`, which exist."""
        self.folder, self.count = folder, count
        self._block = lru_cache(_MAPPED)(self._map)

    def _map(self, number: int) -> NDArray[np.float32]:
        # Who made the blocks has looked at every number; a search would read each block twice.
        rows = min(ROWS, self.count - number * ROWS)
        block = _load(_path(self.folder, number), rows, numbers=False)
        if block is None:
            raise DataError(
                f"{_path(self.folder, number)}: missing or damaged since it was written; run the "
                "command again, which makes it again"
            )
        return block

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return int(self._block(0).shape[1])

    @property
    def longest_part(self) -> int:
        """Rows of the longest block that `parts` yields."""
        return min(ROWS, self.count)

    def parts(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (number of the first row, its block), in order."""
        for first in range(0, self.count, ROWS):
            yield first, self._map(first // ROWS)

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of these rows, (len(numbers), D)."""
        found = np.empty((len(numbers), self.dimension), np.float32)
        for block in np.unique(numbers // ROWS).tolist():
            chosen = numbers // ROWS == block
            found[chosen] = self._block(block)[numbers[chosen] % ROWS]
        return found


class Growing:
    """Rows that are appended to the blocks of a folder; memory holds the last block."""

    def __init__(self, folder: Path) -> None:
        """Begin with no rows; the folder exists and is empty."""
        self.folder, self.count = folder, 0
        self._last: NDArray[np.float32] | None = None

    def append(self, rows: NDArray[np.float32]) -> None:
        """Append rows, (n, D)."""
        left = rows if self._last is None else np.concatenate([self._last, rows])
        first = (self.count - (len(left) - len(rows))) // ROWS
        self.count += len(rows)
        whole = len(left) // ROWS
        for number in range(whole):
            _save(_path(self.folder, first + number), left[number * ROWS : (number + 1) * ROWS])
        self._last = left[whole * ROWS :].copy()

    def vectors(self) -> Vectors:
        """Return what was appended so far."""
        if self._last is not None and len(self._last):
            _save(_path(self.folder, self.count // ROWS), self._last)
        return Vectors(self.folder, self.count)


def block_of(
    folder: Path, number: int, count: int, make: Callable[[], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return block `number`, of `count` rows, memory-mapped; make it if it is not complete."""
    path = _path(folder, number)
    block = _load(path, count)
    if block is None:
        _save(path, make())
        block = _load(path, count)
        assert block is not None, path
    return block


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def _save(path: Path, vectors: NDArray[np.float32]) -> None:
    with atomic_file(path) as file:
        np.save(file, vectors.astype(np.float32), allow_pickle=False)


def _load(path: Path, count: int, *, numbers: bool = True) -> NDArray[np.float32] | None:
    """Return the block at `path`, mapped; None when it is missing or not whole.

    numbers: Whether a block with a number that is not finite counts as not whole, too.
    """
    try:
        block: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = block.ndim == 2 and len(block) == count and block.dtype == np.float32
    return block if whole and (not numbers or np.isfinite(block).all()) else None
