"""Number the distinct texts of a stream, in the order of their first occurrence."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.mining.stored import StoredTexts, TextWriter


class Numbers:
    """The numbers of distinct texts, which are known by 8 bytes of a hash.

    Args:
        texts: The hash of each text of a stream.
        kept: Whether a text gets a number; None: all do.

    Attributes:
        places: Where in the stream each number occurs first.
        known: The distinct hashes, ascending.
    """

    def __init__(self, texts: NDArray[np.uint64], kept: NDArray[np.bool_] | None = None) -> None:
        among = np.arange(len(texts)) if kept is None else np.flatnonzero(kept)
        self.known, first = np.unique(texts[among], return_index=True)
        order = np.argsort(first)
        self.places = among[first[order]]
        self._number = np.empty_like(order)
        self._number[order] = np.arange(len(order))

    def of(self, texts: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the number of each text; -1 for texts that have none."""
        if not len(self.known):
            return np.full(len(texts), -1, np.int64)
        at = np.searchsorted(self.known, texts).clip(max=len(self.known) - 1)
        return np.where(self.known[at] == texts, self._number[at], -1)


def keep_distinct(folder: Path, every: str, name: str, places: NDArray[np.int64]) -> None:
    """Write those of the texts `every` that are at `places` as `name`, and remove `every`."""
    texts = StoredTexts(folder / every)
    with TextWriter(folder / name) as distinct:
        for place in places:
            distinct.append(texts[int(place)])
    for path in folder.glob(f"{every}.*"):
        path.unlink()


def hashes(numbers: array[int]) -> NDArray[np.uint64]:
    """Return an array of the type "Q" as numpy's; empty ones, too."""
    return np.frombuffer(numbers, np.uint64) if len(numbers) else np.empty(0, np.uint64)
