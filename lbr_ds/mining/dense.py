"""Exact search by inner product, block by block: every query meets every passage.

Memory: (QUERIES, ROWS) scores and the blocks that they come from, whatever the corpus: with 4096
dimensions about 60 MB. No approximate index: the pool of one domain is small enough, and an exact
search gives the same negatives on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking, best
from lbr_ds.mining.vectors import Vectors

QUERIES = 1024  # a block
Progress = Callable[[str, int, int | None], None]


def rank(
    pool: Pool, queries: Vectors, passages: Vectors, count: int, progress: Progress | None = None
) -> Iterator[Ranking]:
    """The `count` best passages for each query of the pool, in the order of its queries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = len(pool.queries)
    for start in range(0, total, QUERIES):
        numbers = np.arange(start, min(start + QUERIES, total))
        rows = torch.from_numpy(queries.rows(numbers)).to(device)
        found: list[tuple[NDArray[np.int64], NDArray[np.float32]]]
        found = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in numbers]
        for first, block in passages.parts():
            scores = (rows @ torch.from_numpy(np.array(block)).to(device).T).cpu().numpy()
            for i, number in enumerate(numbers):
                _ban(scores[i], pool.banned[number], first)
                found[i] = _merge(*found[i], scores[i], first, count)
        for i, number in enumerate(numbers):
            yield Ranking(*found[i], positive_score(pool, queries, passages, int(number)))
        if progress:
            progress("search", int(numbers[-1]) + 1, total)


def _merge(
    ids: NDArray[np.int64],
    values: NDArray[np.float32],
    scores: NDArray[np.float32],
    first: int,
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best so far (`ids`, `values`) and those of a further block, whose numbers are higher."""
    hits = np.flatnonzero(scores > (values[-1] if len(values) == count else -np.inf))
    if not len(hits):
        return ids, values
    return best(np.concatenate([values, scores[hits]]), np.concatenate([ids, first + hits]), count)


def _ban(scores: NDArray[np.float32], banned: NDArray[np.int64], first: int) -> None:
    """Set the scores of `banned` to -inf, where `scores` begins at passage `first`."""
    low, high = np.searchsorted(banned, [first, first + len(scores)])
    scores[banned[low:high] - first] = -np.inf


def positive_score(pool: Pool, queries: Vectors, passages: Vectors, number: int) -> float:
    """The lowest score among the positives of query `number`."""
    row = queries.rows(np.array([number]))[0]
    return float((passages.rows(pool.positives[number]) @ row).min(initial=np.inf))
