"""Collate the texts of stage 2, and the hashes by which candidates are excluded as negatives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lbr_ds.batching.pack import with_tensors
from lbr_ds.batching.tokenizer import Sequence, TextTokenizer
from lbr_ds.errors import DataError
from lbr_ds.records import Record

Teacher = Callable[[list[str], list[str]], NDArray[Any]]


@dataclass(frozen=True)
class Pairs:
    """n queries and their n*(1+M) candidates: positives first, then M negatives for each query.

    Attributes:
        sequences: n queries, then the candidates.
        group: (n,) int64, the hash of each query's group.
        known: (n, P) int64, the hashes of all positives of each query's record, padded with -1.
        text: (n*(1+M),) int64, the hash of each candidate's text.
        real: (n*(1+M),) bool, False for a placeholder, where a record had fewer than M negatives.
        scores: (n, 1+M) float32, a teacher's scores of each query's positive and negatives, nan
            where there is no score; None if they were not requested.
        teacher: (n + n*(1+M), E), a teacher's vectors of the sequences, nan where there is no
            vector; None if they were not requested.
        temperature: (n,) float64, the temperature of each query; None: all have the recipe's.
        kind: (n,) int64, the number of each query's source, for statistics, or -1; None: no
            statistics.
    """

    sequences: list[Sequence]
    group: Tensor
    known: Tensor
    text: Tensor
    real: Tensor
    scores: Tensor | None = None
    teacher: Tensor | None = None
    temperature: Tensor | None = None
    kind: Tensor | None = None

    @property
    def num_queries(self) -> int:
        """The number n of queries."""
        return len(self.group)

    def to(self, device: torch.device) -> Pairs:
        """Return the pairs on another device."""
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def candidate_labels(self) -> Tensor:
        """Return (n*(1+M), 3) int64 to gather from all ranks: each candidate's group, text, real.

        Only a positive has the group of its record (else -1); a mined negative belongs to none.
        """
        groups = torch.full_like(self.text, -1)
        groups[: self.num_queries] = self.group
        return torch.stack([groups, self.text, self.real.long()], dim=1)


def hashed(text: str) -> int:
    """Return a 63-bit hash of a text, the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def contrastive_pairs(
    records: list[Record],
    turns: list[int],
    tokenizer: TextTokenizer,
    num_negatives: int,
    *,
    scored: bool = False,
    teacher: Teacher | None = None,
) -> Pairs:
    """Return the pairs of a rank's share of a step.

    Args:
        records: the share's records.
        turns: for each record, which of its positives and negatives, modulo their number.
        tokenizer: the prepared one.
        num_negatives: M.
        scored: whether to return the records' scores too.
        teacher: takes n queries and their candidates and returns its vectors of both, in order.

    Raises:
        DataError: a record has no query, or its instruction leaves no room for it.
    """
    for record in records:
        if record.text:
            raise DataError(
                f"record {record.id}: stage 2 needs a query and positives, not a plain passage; "
                "set stage2.pairs=crop, or write queries with `lbr-ds synthesize`"
            )
    queries: list[str] = [r.instructed_query() for r in records]
    positives = [r.positives[t % len(r.positives)] for r, t in zip(records, turns, strict=True)]
    negatives: list[str] = []
    real = [True] * len(records)
    for record, turn, positive in zip(records, turns, positives, strict=True):
        chosen = [record.negatives[place] for place in _drawn(record, turn, num_negatives)]
        have = len(chosen)
        # Every rank must hold the same number of candidates; a placeholder is encoded, and masked.
        negatives += chosen + [positive] * (num_negatives - have)
        real += [True] * have + [False] * (num_negatives - have)
    known = [[hashed(p) for p in r.positives] for r in records]
    most = max(len(k) for k in known)
    # M negatives of each record in turn, with its document instruction before each of them.
    owners = records + [record for record in records for _ in range(num_negatives)]
    texts = positives + negatives
    passages: list[str] = [
        owner.instructed_passage(text) for owner, text in zip(owners, texts, strict=True)
    ]
    return Pairs(
        sequences=tokenizer.embed(queries + passages),
        group=torch.tensor([hashed(r.group or r.id) for r in records]),
        known=torch.tensor([k + [-1] * (most - len(k)) for k in known]),
        text=torch.tensor([hashed(text) for text in texts]),
        real=torch.tensor(real),
        scores=_scores(records, turns, num_negatives) if scored else None,
        teacher=_vectors(teacher, queries, passages, real) if teacher else None,
    )


def _vectors(teacher: Teacher, queries: list[str], passages: list[str], real: list[bool]) -> Tensor:
    """Return the teacher's vectors of queries and candidates; placeholders have none."""
    found = torch.from_numpy(teacher(queries, passages))
    found[len(queries) :][~torch.tensor(real)] = torch.nan
    return found


def _drawn(record: Record, turn: int, num_negatives: int) -> list[int]:
    """Return the places of the record's negatives that are used at this turn, at most M."""
    have = min(num_negatives, len(record.negatives))
    return [(turn * have + i) % len(record.negatives) for i in range(have)]


def _scores(records: list[Record], turns: list[int], num_negatives: int) -> Tensor:
    """Return (n, 1+M) float32: the scores of the drawn positive and negatives, nan for none."""
    found = torch.full((len(records), 1 + num_negatives), float("nan"))
    for row, record, turn in zip(found, records, turns, strict=True):
        if record.positive_scores and record.negative_scores:
            places = _drawn(record, turn, num_negatives)
            scores = [record.positive_scores[turn % len(record.positives)]]
            scores += [record.negative_scores[place] for place in places]
            row[: len(scores)] = torch.tensor(scores)
    return found
