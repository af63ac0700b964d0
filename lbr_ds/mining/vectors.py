"""Vectors of texts on disk, in blocks; a killed run resumes after its last complete block.

A set of vectors is stored in `WORK/KEY/00000.npy` ..., where KEY hashes the model's
fingerprint, the side and every text in order, so that vectors are never used for other texts or
another model. A block
appears in one rename, and one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder
from lbr_ds.errors import DataError
from lbr_ds.instructions import Side, instruction_of
from lbr_ds.system.atomic import atomic_file
from lbr_ds.system.progress import Progress, no_progress

_MAPPED = 256  # blocks
ROWS = 1024  # texts per block; a killed run may lose one block


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
        block = _load(_path(self.folder, number), min(ROWS, self.count - number * ROWS))
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


def embed(
    texts: Sequence[str],
    encoder: Encoder,
    side: Side,
    work: Path,
    progress: Progress = no_progress,
) -> Vectors:
    """Return the vectors of `texts` (at least one); blocks of an earlier run are used.

    Memory: one block of vectors and the model. Raises OSError when the disk is full.
    """
    folder = work / cache_key(texts, encoder, side)
    for first in range(0, len(texts), ROWS):
        part = list(texts[first : first + ROWS])
        block_of(folder, first // ROWS, len(part), partial(encoder.encode, part, side))
        progress(f"encode {side} ({encoder.name})", first + len(part), len(texts))
    return Vectors(folder, len(texts))


def embed_share(
    texts: Sequence[str],
    encoder: Encoder,
    side: Side,
    work: Path,
    world: World,
    progress: Progress = no_progress,
) -> None:
    """Make this rank's share of the blocks of `embed`: every `world.size`-th.

    A block is one call of the encoder either way, so its bytes do not depend on the ranks.
    """
    folder = work / cache_key(texts, encoder, side)
    for first in range(world.rank * ROWS, len(texts), world.size * ROWS):
        part = list(texts[first : first + ROWS])
        block_of(folder, first // ROWS, len(part), partial(encoder.encode, part, side))
        progress(f"encode {side} ({encoder.name})", first + len(part), len(texts))


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


def cache_key(texts: Sequence[str], encoder: Encoder, side: Side) -> str:
    """Return 20 hex digits that identify these texts and this model."""
    digest = hashlib.sha256(f"{encoder.fingerprint} {side} {ROWS}\n".encode())
    for text in texts:
        raw, begin = text.encode(), len(instruction_of(text))
        digest.update(f"{len(raw)}{f'-{begin}' if begin else ''}:".encode() + raw)
    return digest.hexdigest()[:20]


def is_key(name: str) -> bool:
    """Return whether a folder of this name holds vectors."""
    return re.fullmatch(r"[0-9a-f]{20}", name) is not None


def _save(path: Path, vectors: NDArray[np.float32]) -> None:
    with atomic_file(path) as file:
        np.save(file, vectors.astype(np.float32), allow_pickle=False)


def _load(path: Path, count: int) -> NDArray[np.float32] | None:
    """Return the block at `path`, mapped; None when it is missing or not whole."""
    try:
        block: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = block.ndim == 2 and len(block) == count and block.dtype == np.float32
    return block if whole and np.isfinite(block).all() else None
