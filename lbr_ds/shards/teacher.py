"""A teacher's vectors of the texts of cl, in two files beside the shards.

teacher-keys.npy     (N,) int64, sorted: the hash of each text and its side
teacher-vectors.npy  (N, E) float16, of unit length: its vector, in the same order

`lbr-ds mine` writes them, and the manifest lists their sizes and hashes. They are memory-mapped, so
a loader process reads only the rows of its samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.shards.manifest import Manifest
from lbr_ds.system.locate import file_sha256

KEYS, VECTORS = "teacher-keys.npy", "teacher-vectors.npy"
FILES = (KEYS, VECTORS)
_AGAIN = "run `lbr-ds mine --teacher-vectors MODEL`"


def text_key(text: str, side: Literal["query", "document"]) -> int:
    """Return a 63-bit hash of a text as one side encodes it, with its instruction."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=side.encode()).digest()
    return int.from_bytes(digest, "big") >> 1


class TeacherVectors:
    """The vectors of a prepared folder. Picklable; opens the files on demand.

    Args:
        manifest: Of the prepared folder.

    Raises:
        DataError: The manifest lists no such files.
    """

    def __init__(self, manifest: Manifest) -> None:
        if missing := [name for name in FILES if name not in manifest.files]:
            raise DataError(f"{manifest.place} has no {missing[0]}; {_AGAIN}")
        self.manifest = manifest

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        found = []
        for name in FILES:
            path = self.manifest.path_of(name)
            try:
                found.append(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path}: not an array ({error}); {_AGAIN} again") from None
        return found[0], found[1]

    @property
    def dimension(self) -> int:
        """Components of a vector."""
        return int(self._arrays[1].shape[1])

    def rows(self, keys: Sequence[int]) -> NDArray[np.float16]:
        """Return the vectors of these keys, (len(keys), E); nan where there is none."""
        known, vectors = self._arrays
        wanted = np.array(keys, np.int64)
        places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        found = np.full((len(wanted), vectors.shape[1]), np.nan, np.float16)
        there = known[places] == wanted
        found[there] = vectors[places[there]]
        return found

    def of(self, queries: Sequence[str], passages: Sequence[str]) -> NDArray[np.float16]:
        """Return the vectors of queries, then those of passages, as `rows`."""
        keys = [text_key(text, "query") for text in queries]
        return self.rows([*keys, *(text_key(text, "document") for text in passages)])

    def check(self) -> None:
        """Raise DataError unless both files are as the manifest lists them."""
        for name in FILES:
            self.manifest.located(name)


@lru_cache(maxsize=2)
def teacher_vectors(folder: Path | str, cache_gib: float) -> TeacherVectors:
    """Return the vectors of a prepared folder, opened once in each process."""
    return TeacherVectors(Manifest.load(folder, cache_gib))


def write_teacher(
    folder: Path,
    keys: Sequence[int] | NDArray[np.int64],
    vectors: Iterator[NDArray[np.float32]],
    dimension: int,
) -> None:
    """Write both files into a folder.

    Args:
        folder: Of the shards.
        keys: Of N different texts.
        vectors: Of the same texts, in blocks; one block is in memory at a time.
        dimension: E.
    """
    plain = np.array(keys, np.int64)
    order = np.argsort(plain)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    with (folder / KEYS).open("wb") as file:
        np.save(file, plain[order], allow_pickle=False)
    shape = (len(plain), dimension)
    whole = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float16, shape)
    first = 0
    for block in vectors:
        whole[place[first : first + len(block)]] = block
        first += len(block)
    assert first == len(plain)
    whole.flush()
    del whole


def hash_of(folder: Path) -> str:
    """Return a hash of both files."""
    return "".join(file_sha256(folder / name) for name in FILES)
