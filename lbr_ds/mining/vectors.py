"""Texts -> vectors on disk, in blocks; a killed run goes on after its last whole block.

A set of vectors lies in `WORK/KEY/00000.npy` ..., where KEY is a hash of the model's fingerprint,
the side and every text in order. So other texts or another model never meet old vectors. A block
appears in one rename, and one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder
from lbr_ds.instructions import Side, instruction_of
from lbr_ds.system.atomic import atomic_file
from lbr_ds.system.progress import Progress, no_progress

ROWS = 1024  # texts a block; also what a killed run may lose


@dataclass(frozen=True)
class Vectors:
    """(count, D) float32 of unit rows, mapped from disk; block i holds rows i * ROWS and on."""

    blocks: list[NDArray[np.float32]]
    count: int

    def parts(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(number of the first row, its block), in order."""
        for number, block in enumerate(self.blocks):
            yield number * ROWS, block

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(numbers), D): a copy of these rows."""
        found = np.empty((len(numbers), self.blocks[0].shape[1]), np.float32)
        for block in np.unique(numbers // ROWS):
            chosen = numbers // ROWS == block
            found[chosen] = self.blocks[block][numbers[chosen] % ROWS]
        return found


def embed(
    texts: Sequence[str],
    encoder: Encoder,
    side: Side,
    work: Path,
    progress: Progress = no_progress,
) -> Vectors:
    """The vectors of `texts` (at least one); blocks that a former run left are used.

    Memory: one block of vectors and the model. Raises OSError when the disk is full.
    """
    folder = work / cache_key(texts, encoder, side)
    blocks = []
    for first in range(0, len(texts), ROWS):
        part = list(texts[first : first + ROWS])
        blocks.append(_block(folder, first // ROWS, part, encoder, side))
        progress(f"encode {side} ({encoder.name})", first + len(part), len(texts))
    return Vectors(blocks, len(texts))


def embed_share(
    texts: Sequence[str],
    encoder: Encoder,
    side: Side,
    work: Path,
    world: World,
    progress: Progress = no_progress,
) -> None:
    """Of the blocks that `embed` would make those of this rank: every `world.size`-th.

    A block is one call of the encoder either way, so its bytes do not depend on the ranks.
    """
    folder = work / cache_key(texts, encoder, side)
    for first in range(world.rank * ROWS, len(texts), world.size * ROWS):
        part = list(texts[first : first + ROWS])
        _block(folder, first // ROWS, part, encoder, side)
        progress(f"encode {side} ({encoder.name})", first + len(part), len(texts))


def _block(
    folder: Path, number: int, texts: list[str], encoder: Encoder, side: Side
) -> NDArray[np.float32]:
    """Block `number`, mapped; made when it is missing or not whole."""
    path = folder / f"{number:05d}.npy"
    block = _load(path, len(texts))
    if block is None:
        _save(path, encoder.encode(texts, side))
        block = _load(path, len(texts))
        assert block is not None, path
    return block


def cache_key(texts: Sequence[str], encoder: Encoder, side: Side) -> str:
    """20 hex digits for these texts by this model."""
    digest = hashlib.sha256(f"{encoder.fingerprint} {side} {ROWS}\n".encode())
    for text in texts:
        raw, begin = text.encode(), len(instruction_of(text))
        digest.update(f"{len(raw)}{f'-{begin}' if begin else ''}:".encode() + raw)
    return digest.hexdigest()[:20]


def is_key(name: str) -> bool:
    """Whether a folder of this name holds vectors."""
    return re.fullmatch(r"[0-9a-f]{20}", name) is not None


def _save(path: Path, vectors: NDArray[np.float32]) -> None:
    with atomic_file(path) as file:
        np.save(file, vectors.astype(np.float32), allow_pickle=False)


def _load(path: Path, count: int) -> NDArray[np.float32] | None:
    """The block at `path`, mapped; None when it is missing or not whole."""
    try:
        block: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = block.ndim == 2 and len(block) == count and block.dtype == np.float32
    return block if whole and np.isfinite(block).all() else None
