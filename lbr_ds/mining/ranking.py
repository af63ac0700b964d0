"""Scores -> the best passages, ties to the lower number: one result whatever the blocks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranking(NamedTuple):
    """What a method finds for one query: banned passages left out, rank 1 first.

    positive: the lowest score among the query's own positives.
    """

    passages: NDArray[np.int64]
    scores: NDArray[np.float32]
    positive: float


def best(
    scores: NDArray[np.float32], passages: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The `count` best of (n,) scores with their passages, sorted; -inf is never among them."""
    floor = -np.inf
    if len(scores) > count:
        floor = np.partition(scores, len(scores) - count)[len(scores) - count]
    # A tie at the floor must be settled by number, so all of its members are sorted.
    chosen = np.flatnonzero((scores >= floor) & (scores > -np.inf))
    order = chosen[np.lexsort((passages[chosen], -scores[chosen]))][:count]
    return passages[order], scores[order]
