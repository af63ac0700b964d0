"""Vectors of texts on disk, in blocks; a killed run resumes after its last complete block.

A set of vectors is stored in `WORK/KEY/00000.npy` ..., where KEY hashes the model's
fingerprint, the side and every text in order, so that vectors are never used for other texts or
another model. A block is written in one rename, and a damaged block is computed again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError, short
from lbr_ds.instructions import Side, bare
from lbr_ds.mining.stored import digest_of
from lbr_ds.system import blocks
from lbr_ds.system.blocks import Vectors, block_of
from lbr_ds.system.progress import Progress, no_progress

SHOWN = 60  # characters of a text in a message


def embed(
    texts: Sequence[str],
    encoder: Encoder,
    side: Side,
    work: Path,
    progress: Progress = no_progress,
) -> Vectors:
    """Return the vectors of `texts` (at least one); blocks of an earlier run are used.

    Memory: one block of vectors and the model.

    Raises:
        CheckpointError: A vector is not finite.
        OSError: The disk is full.
    """
    folder = work / cache_key(texts, encoder, side)
    for first in range(0, len(texts), blocks.ROWS):
        part = list(texts[first : first + blocks.ROWS])
        make = partial(_encode, encoder, part, side, first)
        block_of(folder, first // blocks.ROWS, len(part), make)
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
    for first in range(world.rank * blocks.ROWS, len(texts), world.size * blocks.ROWS):
        part = list(texts[first : first + blocks.ROWS])
        make = partial(_encode, encoder, part, side, first)
        block_of(folder, first // blocks.ROWS, len(part), make)
        progress(f"encode {side} ({encoder.name})", first + len(part), len(texts))


def _encode(encoder: Encoder, texts: list[str], side: Side, first: int) -> NDArray[np.float32]:
    """Return the vectors of `texts`; `first` is the number of the first of them, from 0."""
    rows = encoder.encode(texts, side)

    def name(row: int) -> str:
        return f"the vector of {side} {first + row + 1} ({short(bare(texts[row]), SHOWN)!r})"

    check_finite(encoder.name, rows, name)
    return rows


def check_finite(model: str, rows: NDArray[np.float32], name: Callable[[int], str]) -> None:
    """Refuse results of a model that are not finite: they cannot be ranked.

    Args:
        model: Its name.
        rows: (N, D) results.
        name: Returns what row i is, for the message.

    Raises:
        CheckpointError: A row has NaN or an infinite number.
    """
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise CheckpointError(
            f"{model}: {name(int(finite.argmin()))} is not finite (NaN or infinite); the model may "
            "overflow in the dtype of its weights: save it in bf16 or fp32, or use another model"
        )


def cache_key(texts: Sequence[str], encoder: Encoder, side: Side) -> str:
    """Return 20 hex digits that identify these texts and this model."""
    names = f"{encoder.fingerprint} {side} {blocks.ROWS} {digest_of(texts)}"
    return hashlib.sha256(names.encode()).hexdigest()[:20]


def is_key(name: str) -> bool:
    """Return whether a folder of this name holds vectors."""
    return re.fullmatch(r"[0-9a-f]{20}", name) is not None
