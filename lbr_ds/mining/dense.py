"""Exact search by inner product, block by block: every query meets every passage.

Memory: (QUERIES, BLOCKS * ROWS) scores and the block that they come from, whatever the corpus: with
4096 dimensions about 70 MB. No approximate index: the pool of one domain is small enough, and an
exact search gives the same negatives on every machine.

FAISS's exact index is not used. On 50,000 passages of 384 dimensions, 2048 queries and one thread
it takes 0.54 of the time (faiss-cpu 1.15), but it breaks ties differently (in 7 of 2048 queries),
rounds by its own BLAS, and would make the negatives depend on what is installed. Encoding the texts
takes far longer than either.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking, best
from lbr_ds.mining.vectors import Vectors
from lbr_ds.system.progress import Progress, no_progress

QUERIES = 1024  # at once
BLOCKS = 8  # of passages that are scored before the best are taken


def rank(
    pool: Pool, queries: Vectors, passages: Vectors, count: int, progress: Progress = no_progress
) -> Iterator[Ranking]:
    """Return the `count` best passages for each query of the pool, in the order of its queries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = len(pool.queries)
    for start in range(0, total, QUERIES):
        numbers = np.arange(start, min(start + QUERIES, total))
        rows = torch.from_numpy(queries.rows(numbers)).to(device)
        found: list[tuple[NDArray[np.int64], NDArray[np.float32]]]
        found = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in numbers]
        banned = [pool.banned(number) for number in numbers.tolist()]
        for first, scores in _scores(rows, passages):
            for i in range(len(numbers)):
                _ban(scores[i], banned[i], first)
                found[i] = _merge(*found[i], scores[i], first, count)
        for i, number in enumerate(numbers):
            yield Ranking(*found[i], positive_score(pool, queries, passages, int(number)))
        progress("search", int(numbers[-1]) + 1, total)


def _scores(rows: torch.Tensor, passages: Vectors) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (number of the first passage, scores of the queries `rows` for the next passages)."""
    parts = passages.parts()
    while several := list(islice(parts, BLOCKS)):
        blocks = (torch.from_numpy(np.array(block)).to(rows.device) for _, block in several)
        yield several[0][0], torch.cat([rows @ block.T for block in blocks], 1).cpu().numpy()


def _merge(
    ids: NDArray[np.int64],
    values: NDArray[np.float32],
    scores: NDArray[np.float32],
    first: int,
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Merge the best so far (`ids`, `values`) with a further block, whose numbers are higher."""
    hits = np.flatnonzero(scores > (values[-1] if len(values) == count else -np.inf))
    if not len(hits):
        return ids, values
    return best(np.concatenate([values, scores[hits]]), np.concatenate([ids, first + hits]), count)


def _ban(scores: NDArray[np.float32], banned: NDArray[np.int64], first: int) -> None:
    """Set the scores of `banned` to -inf, where `scores` begins at passage `first`."""
    low, high = np.searchsorted(banned, [first, first + len(scores)])
    scores[banned[low:high] - first] = -np.inf


def positive_score(pool: Pool, queries: Vectors, passages: Vectors, number: int) -> float:
    """Return the lowest score among the positives of query `number`."""
    row = queries.rows(np.array([number]))[0]
    return float((passages.rows(pool.positives[number]) @ row).min(initial=np.inf))
