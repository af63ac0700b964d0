"""Vectors of texts on disk, in blocks; a killed run resumes after its last complete block.

A set of vectors is stored in `WORK/KEY/00000.npy` ..., where KEY hashes the model's
fingerprint, the side and every text in order, so that vectors are never used for other texts or
another model. A block is written in one rename, and a damaged block is computed again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder
from lbr_ds.instructions import Side
from lbr_ds.mining.stored import digest_of
from lbr_ds.system import blocks
from lbr_ds.system.blocks import Vectors, block_of
from lbr_ds.system.progress import Progress, no_progress


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
    for first in range(0, len(texts), blocks.ROWS):
        part = list(texts[first : first + blocks.ROWS])
        block_of(folder, first // blocks.ROWS, len(part), partial(encoder.encode, part, side))
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
        block_of(folder, first // blocks.ROWS, len(part), partial(encoder.encode, part, side))
        progress(f"encode {side} ({encoder.name})", first + len(part), len(texts))


def cache_key(texts: Sequence[str], encoder: Encoder, side: Side) -> str:
    """Return 20 hex digits that identify these texts and this model."""
    names = f"{encoder.fingerprint} {side} {blocks.ROWS} {digest_of(texts)}"
    return hashlib.sha256(names.encode()).hexdigest()[:20]


def is_key(name: str) -> bool:
    """Return whether a folder of this name holds vectors."""
    return re.fullmatch(r"[0-9a-f]{20}", name) is not None
