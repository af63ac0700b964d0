"""Rankings of one query -> its negatives, and why the others were left out.

A candidate is looked at in the order of the ranks (methods take turns) or in a drawn order, and the
first rule that speaks against it drops it:

- positive_not_found: its method scores the query's own positive at 0 or less, so the method cannot
  tell what is too near. Only where max_ratio or margin is set.
- too_near_the_positive: its score is above `max_ratio` times the positive's, or less than `margin`
  below it; with several positives the lowest counts. Scores are compared within one method, and
  every method that found the candidate may speak.
- same_as_positive: it is a near duplicate of a positive, as `prepare` defines it
  (`data.near_duplicate`).
- same_as_kept: likewise with a negative already kept.
- guide: the guide scores it at or above the positive.

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
        """The scores of `passages`, and the lowest of the query's positives."""
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
    """The rules with their settings; `tally` grows with every query."""

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
        """The negatives of query number `query`, best first or as drawn; at most `keep`."""
        kept: list[Negative] = []
        for found in self._ordered(query, rankings):
            if len(kept) == self.mining.keep:
                break
            self.tally.seen += 1
            reason = self._against(found, rankings) or self._resembles(found, query, kept)
            if reason or self._guided(found, query):
                self.tally.dropped[reason or "guide"] += 1
            else:
                kept.append(found)
        self.tally.kept += len(kept)
        self.tally.short += len(kept) < self.mining.keep
        self.tally.none += not kept
        return kept

    def _ordered(self, query: int, rankings: dict[str, Ranking]) -> list[Negative]:
        """The candidates within the ranks, each once, in the order in which they are looked at."""
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
        turns = (found for row in zip_longest(*columns) for found in row if found is not None)
        once: dict[int, Negative] = {}
        for found in turns:
            # A method whose positive was not found may not speak for another's candidate.
            former = once.get(found.passage)
            if former is None or (former.positive <= 0 < found.positive):
                once[found.passage] = found
        ordered = list(once.values())
        if self.mining.pick == "random":
            Random(f"{self.seed}:{self.pool.queries[query].id}").shuffle(ordered)
        return ordered

    def _against(self, found: Negative, rankings: dict[str, Ranking]) -> str:
        """What the scores say against `found`, or nothing."""
        if self._bounded and found.positive <= 0:
            return "positive_not_found"
        for passages, scores, positive in rankings.values():
            for score in scores[passages == found.passage] if positive > 0 else ():
                if self._too_near(float(score), positive):
                    return "too_near_the_positive"
        return ""

    def _resembles(self, found: Negative, query: int, kept: list[Negative]) -> str:
        """What the text says against `found`, or nothing."""
        if self._same(found.passage, self.pool.positives[query].tolist()):
            return "same_as_positive"
        return "same_as_kept" if self._same(found.passage, [n.passage for n in kept]) else ""

    def _guided(self, found: Negative, query: int) -> bool:
        """Whether the guide takes `found` for an answer."""
        if self.guide is None:
            return False
        scores, positive = self.guide.scores(query, np.array([found.passage]))
        return bool(scores[0] >= positive)

    @property
    def _bounded(self) -> bool:
        return self.mining.max_ratio is not None or self.mining.margin is not None

    def _too_near(self, score: float, positive: float) -> bool:
        ratio, margin = self.mining.max_ratio, self.mining.margin
        above = ratio is not None and score > ratio * positive
        return above or (margin is not None and score > positive - margin)

    def _same(self, passage: int, others: list[int]) -> bool:
        texts = self.pool.passages
        return any(similarity(texts[passage], texts[i]) >= self.near_duplicate for i in others)
