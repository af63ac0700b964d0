"""Select the best passages; ties go to the lower number, so blocks do not change the result."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranking(NamedTuple):
    """The ranking of one query by one method: banned passages are left out, rank 1 comes first.

    positive: the lowest score among the query's own positives.
    """

    passages: NDArray[np.int64]
    scores: NDArray[np.float32]
    positive: float


def best(
    scores: NDArray[np.float32], passages: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the passages with the `count` best scores above -inf, and their scores, sorted."""
    floor = -np.inf
    if len(scores) > count:
        floor = np.partition(scores, len(scores) - count)[len(scores) - count]
    # A tie at the floor must be settled by number, so all of its members are sorted.
    chosen = np.flatnonzero((scores >= floor) & (scores > -np.inf))
    order = chosen[np.lexsort((passages[chosen], -scores[chosen]))][:count]
    return passages[order], scores[order]
