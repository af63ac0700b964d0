"""Choose the negatives of a query from its rankings, and count why others were dropped.

Candidates are examined in the order of their ranks (methods take turns) or in a random order. The
first rule that applies drops a candidate:

- positive_not_found: the method that found the candidate scores the query's own positive at 0 or
  less, so a limit relative to the positive is meaningless. Only if max_ratio or margin is set.
- too_near_the_positive: the candidate's score is above `max_ratio` times the positive's, or less
  than `margin` below it; with several positives the lowest counts. Scores are compared within one
  method, and one method that finds the candidate too near suffices.
- same_as_positive: the candidate is a near duplicate of a positive, as `prepare` defines it
  (`data.near_duplicate`).
- same_as_kept: the candidate is a near duplicate of a negative already kept.
- guide: the guide scores the candidate at or above the positive.

Passages of the query's group and texts of eval are not candidates at all (`pool.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lbr_ds.config import MiningConfig
from lbr_ds.corpora.curate.segmentation import similarity
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking

REASONS = (
    "positive_not_found",
    "too_near_the_positive",
    "same_as_positive",
    "same_as_kept",
    "guide",
)


class Guide(Protocol):
    """A second opinion on one query."""

    def scores(self, query: int, passages: NDArray[np.int64]) -> tuple[NDArray[np.float32], float]:
        """Return the scores of `passages`, and the lowest of the query's positives."""
        ...


class Negative(NamedTuple):
    """A passage that was kept; rank and score are those of `method`."""

    passage: int
    method: str
    rank: int
    score: float
    positive: float


@dataclass
class Tally:
    """Counts over all queries."""

    seen: int = 0
    kept: int = 0
    short: int = 0  # queries with fewer than `keep`
    none: int = 0  # queries with none at all
    dropped: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))


class Chooser:
    """The rules with their settings; `tally` counts over all queries."""

    def __init__(
        self,
        pool: Pool,
        mining: MiningConfig,
        seed: int,
        guide: Guide | None = None,
        *,
        near_duplicate: float,
    ) -> None:
        self.pool, self.mining, self.seed, self.guide = pool, mining, seed, guide
        self.near_duplicate = near_duplicate
        self.tally = Tally()

    def choose(self, query: int, rankings: dict[str, Ranking]) -> list[Negative]:
        """Return the negatives of query number `query`, best first or as drawn; at most `keep`."""
        kept: list[Negative] = []
        for candidate in self._ordered(query, rankings):
            if len(kept) == self.mining.keep:
                break
            self.tally.seen += 1
            reason = self._against(candidate, rankings) or self._resembles(candidate, query, kept)
            if reason or self._guided(candidate, query):
                self.tally.dropped[reason or "guide"] += 1
            else:
                kept.append(candidate)
        self.tally.kept += len(kept)
        self.tally.short += len(kept) < self.mining.keep
        self.tally.none += not kept
        return kept

    def _ordered(self, query: int, rankings: dict[str, Ranking]) -> list[Negative]:
        """Return the candidates within the ranks, each once, in the order of examination."""
        first, last = self.mining.ranks
        columns = []
        for method, (passages, scores, positive) in rankings.items():
            span = range(first, min(last, len(passages)) + 1)
            columns.append(
                [
                    Negative(int(passages[r - 1]), method, r, float(scores[r - 1]), positive)
                    for r in span
                ]
            )
        turns = (
            candidate for row in zip_longest(*columns) for candidate in row if candidate is not None
        )
        once: dict[int, Negative] = {}
        for candidate in turns:
            # A method that did not find the positive must not represent another's candidate.
            former = once.get(candidate.passage)
            if former is None or (former.positive <= 0 < candidate.positive):
                once[candidate.passage] = candidate
        ordered = list(once.values())
        if self.mining.pick == "random":
            Random(f"{self.seed}:{self.pool.ids[query]}").shuffle(ordered)
        return ordered

    def _against(self, candidate: Negative, rankings: dict[str, Ranking]) -> str:
        """Return the reason that the scores give to drop a candidate, or ""."""
        if self._bounded and candidate.positive <= 0:
            return "positive_not_found"
        for passages, scores, positive in rankings.values():
            for score in scores[passages == candidate.passage] if positive > 0 else ():
                if self._too_near(float(score), positive):
                    return "too_near_the_positive"
        return ""

    def _resembles(self, candidate: Negative, query: int, kept: list[Negative]) -> str:
        """Return the reason that the text gives to drop a candidate, or ""."""
        if self._repeats(candidate.passage, self.pool.positives[query].tolist()):
            return "same_as_positive"
        return "same_as_kept" if self._repeats(candidate.passage, [n.passage for n in kept]) else ""

    def _guided(self, candidate: Negative, query: int) -> bool:
        """Return whether the guide scores the candidate like an answer."""
        if self.guide is None:
            return False
        scores, positive = self.guide.scores(query, np.array([candidate.passage]))
        return bool(scores[0] >= positive)

    @property
    def _bounded(self) -> bool:
        return self.mining.max_ratio is not None or self.mining.margin is not None

    def _too_near(self, score: float, positive: float) -> bool:
        ratio, margin = self.mining.max_ratio, self.mining.margin
        above = ratio is not None and score > ratio * positive
        return above or (margin is not None and score > positive - margin)

    def _repeats(self, passage: int, others: list[int]) -> bool:
        texts = self.pool.passages
        return any(similarity(texts[passage], texts[i]) >= self.near_duplicate for i in others)
