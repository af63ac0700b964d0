"""A teacher's scores of (query, passage) pairs, by a cross-encoder or by an embedder's vectors.

Scores are stored in blocks as vectors are (`vectors.py`), so that ranks share the work and a killed
command resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder, folder_hash, weights_hash
from lbr_ds.instructions import Side
from lbr_ds.mining import vectors
from lbr_ds.mining.vectors import Vectors, block_of, embed, embed_share
from lbr_ds.records import Record
from lbr_ds.runs import resolve_model
from lbr_ds.system.progress import Progress, no_progress

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

_PAIRS = 32  # in one forward pass


class Texts(NamedTuple):
    """The different texts of some records, as a model encodes them."""

    queries: list[str]
    passages: list[str]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Texts:
        """Return the texts of all records with a query."""
        queries: dict[str, None] = {}
        passages: dict[str, None] = {}
        for record in records:
            if record.query:
                queries[record.instructed_query()] = None
                for text in (*record.positives, *record.negatives):
                    passages[record.instructed_passage(text)] = None
        return cls(list(queries), list(passages))

    def encode(self, encoder: Encoder, work: Path, progress: Progress) -> tuple[Vectors, Vectors]:
        """Return the vectors of queries and passages."""
        return (
            embed(self.queries, encoder, "query", work, progress),
            embed(self.passages, encoder, "document", work, progress),
        )

    def encode_share(self, encoder: Encoder, work: Path, world: World, progress: Progress) -> None:
        """Make this rank's share of the vectors."""
        sides: tuple[tuple[list[str], Side], ...]
        sides = (self.queries, "query"), (self.passages, "document")
        for texts, side in sides:
            embed_share(texts, encoder, side, work, world, progress)


class Embedder:
    """Scores are cosines, at most 1."""

    kind = "embedder"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.name = encoder, encoder.name

    @property
    def fingerprint(self) -> str:
        """See `Encoder`."""
        return self.encoder.fingerprint

    def share(self, records: list[Record], work: Path, world: World, progress: Progress) -> None:
        """Do this rank's share of what `scores` needs."""
        Texts.of(records).encode_share(self.encoder, work, world, progress)

    def scores(
        self, records: list[Record], work: Path, progress: Progress = no_progress
    ) -> Iterator[NDArray[np.float32]]:
        """Yield for each record with a query the scores of its positives, then its negatives."""
        texts = Texts.of(records)
        queries, passages = texts.encode(self.encoder, work, progress)
        of_query = {text: number for number, text in enumerate(texts.queries)}
        of_passage = {text: number for number, text in enumerate(texts.passages)}
        for record in records:
            if record.query:
                own = [
                    of_passage[record.instructed_passage(text)]
                    for text in (*record.positives, *record.negatives)
                ]
                (row,) = queries.rows(np.array([of_query[record.instructed_query()]]))
                yield passages.rows(np.array(own)) @ row


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

    def share(self, records: list[Record], work: Path, world: World, progress: Progress) -> None:
        """Make this rank's share of the blocks of scores: every `world.size`-th."""
        self._blocks(records, work, world, progress)

    def scores(
        self, records: list[Record], work: Path, progress: Progress = no_progress
    ) -> Iterator[NDArray[np.float32]]:
        """Yield for each record with a query the scores of its positives, then its negatives."""
        blocks = self._blocks(records, work, World(), progress)
        flat = np.concatenate([block[:, 0] for block in blocks]) if blocks else np.empty(0)
        first = 0
        for record in records:
            if record.query:
                count = len(record.positives) + len(record.negatives)
                yield flat[first : first + count].astype(np.float32)
                first += count

    def _blocks(
        self, records: list[Record], work: Path, world: World, progress: Progress
    ) -> list[NDArray[np.float32]]:
        """Return every `world.size`-th block, from that of this rank on."""
        pairs = [
            (record.query, text)
            for record in records
            if record.query
            for text in (*record.positives, *record.negatives)
        ]
        folder, rows, blocks = work / self._key(pairs), vectors.ROWS, []
        for first in range(world.rank * rows, len(pairs), world.size * rows):
            part = pairs[first : first + rows]
            blocks.append(block_of(folder, first // rows, len(part), partial(self._rate, part)))
            progress(f"score ({self.name})", first + len(part), len(pairs))
        return blocks

    def _key(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return 20 hex digits that identify these pairs and this model."""
        digest = hashlib.sha256(f"{self.fingerprint} pairs {vectors.ROWS}\n".encode())
        for pair in pairs:
            for raw in (text.encode() for text in pair):
                digest.update(f"{len(raw)}:".encode() + raw)
        return digest.hexdigest()[:20]


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
