"""A teacher's scores of (query, passage) pairs, by a cross-encoder or by an embedder's vectors.

Scores are stored in blocks as vectors are (`vectors.py`), so that ranks share the work and a killed
command resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder, folder_hash, weights_hash
from lbr_ds.errors import short
from lbr_ds.instructions import Side
from lbr_ds.mining.pairs import Pairs
from lbr_ds.mining.stored import StoredTexts
from lbr_ds.mining.vectors import SHOWN, check_finite, embed, embed_share
from lbr_ds.runs import resolve_model
from lbr_ds.system import blocks
from lbr_ds.system.blocks import Vectors, block_of
from lbr_ds.system.progress import Progress, no_progress

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

_PAIRS = 32  # in one forward pass


def encode(pairs: Pairs, encoder: Encoder, work: Path, progress: Progress) -> list[Vectors]:
    """Return the vectors of queries and passages."""
    return [embed(texts, encoder, side, work, progress) for texts, side in _sides(pairs)]


def encode_share(
    pairs: Pairs, encoder: Encoder, work: Path, world: World, progress: Progress
) -> None:
    """Make this rank's share of the vectors of queries and passages."""
    for texts, side in _sides(pairs):
        embed_share(texts, encoder, side, work, world, progress)


def _sides(pairs: Pairs) -> tuple[tuple[StoredTexts, Side], ...]:
    return (pairs.queries, "query"), (pairs.passages, "document")


class Embedder:
    """Scores are cosines, at most 1."""

    kind = "embedder"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name = encoder, encoder.name

    @property
    def fingerprint(self) -> str:
        """See `Encoder`."""
        return self.encoder.fingerprint

    def share(self, pairs: Pairs, work: Path, world: World, progress: Progress) -> None:
        """Do this rank's share of what `scores` needs."""
        encode_share(pairs, self.encoder, work, world, progress)

    def scores(
        self, pairs: Pairs, work: Path, progress: Progress = no_progress
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the scores of all pairs in order, a part of them at a time."""
        queries, passages = encode(pairs, self.encoder, work, progress)
        for number, own in enumerate(pairs.passages_of):
            (row,) = queries.rows(pairs.query_of[number : number + 1])
            yield passages.rows(own) @ row


class Reranker:
    """Scores are the logits of a cross-encoder of sentence-transformers."""

    kind = "cross-encoder"

    def __init__(self, name: str, *, trust_remote_code: bool = False) -> None:
        self.name, self.trust_remote_code = name, trust_remote_code

    @cached_property
    def model(self) -> CrossEncoder:
        """The model, loaded at the first use."""
        from lbr_ds.model.stock import load_cross_encoder

        return load_cross_encoder(self.name, trust_remote_code=self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the model's content, as those of `Encoder`."""
        folder = resolve_model(self.name).folder
        if folder is not None:
            return folder_hash(folder)
        return weights_hash(self.name, self.model.state_dict())

    def _rate(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return the logits, (N, 1)."""
        import torch

        found = self.model.predict(
            list(pairs),
            batch_size=_PAIRS,
            show_progress_bar=False,
            activation_fn=torch.nn.Identity(),  # the default is a sigmoid
        )
        return np.asarray(found, np.float32).reshape(-1, 1)

    def share(self, pairs: Pairs, work: Path, world: World, progress: Progress) -> None:
        """Make this rank's share of the blocks of scores: every `world.size`-th."""
        for _ in self._blocks(pairs, work, world, progress):
            pass

    def scores(
        self, pairs: Pairs, work: Path, progress: Progress = no_progress
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the scores of all pairs in order, a part of them at a time."""
        for block in self._blocks(pairs, work, World(), progress):
            yield block[:, 0]

    def _blocks(
        self, pairs: Pairs, work: Path, world: World, progress: Progress
    ) -> Iterator[NDArray[np.float32]]:
        """Yield every `world.size`-th block, from that of this rank on."""
        rows, count = blocks.ROWS, pairs.count
        names = f"{self.fingerprint} pairs {rows} {pairs.digest}"
        folder = work / hashlib.sha256(names.encode()).hexdigest()[:20]
        for first in range(world.rank * rows, count, world.size * rows):
            last = min(first + rows, count)
            make = partial(self._rate_of, pairs, first, last)
            yield block_of(folder, first // rows, last - first, make)
            progress(f"score ({self.name})", last, count)

    def _rate_of(self, pairs: Pairs, first: int, last: int) -> NDArray[np.float32]:
        texts = list(pairs.bare(first, last))
        scores = self._rate(texts)

        def name(row: int) -> str:
            query, passage = (repr(short(text, SHOWN)) for text in texts[row])
            return f"the score of pair {first + row + 1} ({query}, {passage})"

        check_finite(self.name, scores, name)
        return scores


def scorer(name: str, *, trust_remote_code: bool = False) -> Embedder | Reranker:
    """Return the teacher of a name: a cross-encoder or an embedder.

    Raises:
        ConfigError: The folder is missing or holds no model.
        EnvironmentProblem: A name cannot be found.
    """
    from lbr_ds.model.stock import is_cross_encoder

    if not resolve_model(name).ours and is_cross_encoder(name, trust_remote_code=trust_remote_code):
        return Reranker(name, trust_remote_code=trust_remote_code)
    return Embedder(Encoder(name, trust_remote_code=trust_remote_code))
