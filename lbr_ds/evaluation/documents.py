"""The vectors of a corpus that a model gives while it is scored, on disk in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_ds.system.blocks import Growing, Vectors


class Rows:
    """(N, D) float32 on disk; indexing by a slice or by numbers of rows reads a copy of them.

    Args:
        vectors: Blocks of rows.
        places: (N,) which of them are meant.
    """

    def __init__(self, vectors: Vectors, places: NDArray[np.int64]) -> None:
        self._vectors, self._places = vectors, places
        self.shape = (len(places), vectors.dimension)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        return self._vectors.rows(self._places[index])


class Documents(Mapping[str, NDArray[np.float32]]):
    """Vectors by the id of their document, in a temporary folder that is removed with the object.

    Memory holds the ids. The folder is below TMPDIR and has 4 * D bytes per document.

    Args:
        keep: Whether vectors are stored. If not, on ranks whose scores are not used, `rows` gives
            zeros.

    Attributes:
        keep: The same.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep, self._dimension = keep, 0
        self._folder = tempfile.TemporaryDirectory(prefix="lbr-ds-eval-")
        self._stored = Growing(Path(self._folder.name))
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, document: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.rows([document])[:][0]
        return vector

    def add(self, documents: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Store the vectors, (n, D), of those documents that are not stored yet."""
        new = dict(zip(documents, range(len(documents)), strict=True))
        new = {name: place for name, place in new.items() if name not in self._places}
        self._places.update(zip(new, range(len(self), len(self) + len(new)), strict=True))
        self._dimension = vectors.shape[1]
        if self.keep:
            self._stored.append(vectors[list(new.values())])

    def rows(self, documents: Sequence[str]) -> Rows | NDArray[np.float32]:
        """Return the vectors of stored documents, (n, D), which are read when they are indexed."""
        if not self.keep:
            return np.zeros((len(documents), self._dimension), np.float32)
        places = np.array([self._places[name] for name in documents], np.int64)
        return Rows(self._stored.vectors(), places)
