"""Exact search by inner product, block by block: every query is compared with every passage.

A part of the queries is searched at once (`config.mining.searched_together`, 8,192 or fewer).
Memory holds their vectors, the scores of BLOCKS * ROWS passages and the best passages so far: about
400 MB with 4096 dimensions, whatever the size of the corpus. It is allocated once and used again,
because arrays of 1 to 30 MB with different lifetimes fragment the heap of glibc, which then takes
several GB.

The vectors of the passages are read once for each part, and its rankings are stored in
`WORK/KEY/00000.npz` ..., in one rename each. Ranks share these files, and a killed run resumes
after its last complete one. A block of scores is one product of the same shape in any case, so the
result does not depend on the number of ranks.

No approximate index is used: the pool of one domain is small enough, and an exact search gives the
same negatives on every machine. FAISS's exact index is not used either. On 50,000 passages of 384
dimensions, 2048 queries and one thread it takes 0.54 of the time (faiss-cpu 1.15), but it breaks
ties differently (in 7 of 2048 queries), rounds by its own BLAS, and would make the negatives depend
on the installed packages. Encoding the texts takes far longer than either search.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from lbr_ds.config.mining import searched_together
from lbr_ds.distributed import World
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking
from lbr_ds.system.atomic import atomic_file
from lbr_ds.system.blocks import Vectors
from lbr_ds.system.progress import Progress, no_progress

BLOCKS = 2  # of passages that are scored before those that may be among the best are selected


def rank(
    pool: Pool,
    queries: Vectors,
    passages: Vectors,
    count: int,
    work: Path,
    progress: Progress = no_progress,
) -> Iterator[Ranking]:
    """Yield the `count` best passages for each query of the pool, in the order of its queries.

    Rankings that `rank_share` or an earlier run has stored below `work` are read.
    """
    folder = work / rank_key(pool, queries, passages, count)
    for start in range(0, queries.count, searched_together(queries.count, count)):
        found = _stored(pool, queries, passages, count, start, folder)
        progress("search", start + len(found), queries.count)
        yield from found


def rank_share(
    pool: Pool,
    queries: Vectors,
    passages: Vectors,
    count: int,
    work: Path,
    world: World,
    progress: Progress = no_progress,
) -> None:
    """Store this rank's share of the rankings of `rank`: every `world.size`-th block of queries."""
    folder = work / rank_key(pool, queries, passages, count)
    several = searched_together(queries.count, count)
    for start in range(world.rank * several, queries.count, world.size * several):
        found = _stored(pool, queries, passages, count, start, folder)
        progress("search", start + len(found), queries.count)


def rank_key(pool: Pool, queries: Vectors, passages: Vectors, count: int) -> str:
    """Return 20 hex digits that identify the vectors, what is excluded, and `count`."""
    vectors = f"{queries.folder.name} {passages.folder.name}"
    names = f"{vectors} {pool.digest} {count} {searched_together(queries.count, count)} {BLOCKS}"
    return hashlib.sha256(names.encode()).hexdigest()[:20]


def _stored(
    pool: Pool, queries: Vectors, passages: Vectors, count: int, start: int, folder: Path
) -> list[Ranking]:
    """Return the rankings of the queries from `start` on; make and store them when missing."""
    several = searched_together(queries.count, count)
    path = folder / f"{start // several:05d}.npz"
    numbers = np.arange(start, min(start + several, queries.count))
    found = _load(path, len(numbers))
    if found is None:
        found = _rank(pool, queries, passages, count, numbers)
        with atomic_file(path) as file:
            np.savez(
                file,
                lengths=np.array([len(r.passages) for r in found], np.int64),
                passages=np.concatenate([r.passages for r in found]),
                scores=np.concatenate([r.scores for r in found]),
                positives=np.array([r.positive for r in found], np.float64),
            )
    return found


def _load(path: Path, count: int) -> list[Ranking] | None:
    """Return `count` stored rankings; None when they are missing or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            lengths, ids, scores, positives = (
                file[name] for name in ("lengths", "passages", "scores", "positives")
            )
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None
    if not len(lengths) == len(positives) == count or not lengths.sum() == len(ids) == len(scores):
        return None
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(ids, ends), np.split(scores, ends), positives.tolist(), strict=True)
    return [Ranking(*part) for part in parts]


def _rank(
    pool: Pool, queries: Vectors, passages: Vectors, count: int, numbers: NDArray[np.int64]
) -> list[Ranking]:
    """Return the best passages for the queries `numbers`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(queries.rows(numbers)).to(device)
    banned = [pool.banned(number) for number in numbers.tolist()]
    owners, ids = np.repeat(np.arange(len(banned)), list(map(len, banned))), np.concatenate(banned)
    order = np.argsort(ids, kind="stable")
    owners, ids = owners[order], ids[order]
    found, block = _Best(len(banned), count), _Block(rows, passages)
    for first, scores in block.scores():
        within = slice(*np.searchsorted(ids, (first, first + scores.shape[1])).tolist())
        scores[owners[within], ids[within] - first] = -np.inf
        hits = block.hits(scores, torch.from_numpy(found.floors).to(device), count)
        places, columns = (part.cpu().numpy() for part in hits.nonzero(as_tuple=True))
        found.add(places, first + columns, scores[hits].cpu().numpy())  # in the order of `nonzero`
    return [
        Ranking(*best_of, positive_score(pool, queries, passages, number))
        for best_of, number in zip(found.rankings(), numbers.tolist(), strict=True)
    ]


class _Block:
    """The scores of some queries for a block of passages, in memory that the next block takes over.

    Args:
        rows: (Q, D) vectors of the queries.
        passages: All vectors of passages.
    """

    def __init__(self, rows: torch.Tensor, passages: Vectors) -> None:
        self._rows, self._all = rows, passages
        longest = BLOCKS * passages.longest_part
        self._passages = np.empty((longest, passages.dimension), np.float32)
        self._scores = rows.new_empty(len(rows) * longest)
        self._hits = torch.empty_like(self._scores, dtype=torch.bool)

    def scores(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (number of the first passage, (Q, n) scores of it and the next), block by block."""
        parts = self._all.parts()
        while several := list(islice(parts, BLOCKS)):
            count = sum(len(part) for _, part in several)
            np.concatenate([part for _, part in several], out=self._passages[:count])
            columns = torch.from_numpy(self._passages[:count]).to(self._rows.device).T
            out = self._scores[: len(self._rows) * count].view(-1, count)
            yield several[0][0], torch.mm(self._rows, columns, out=out)

    def hits(self, scores: torch.Tensor, floors: torch.Tensor, count: int) -> torch.Tensor:
        """Return which scores may be among the `count` best of their query.

        Only scores above the lowest of a full ranking are: an equal one has a higher number. While
        a ranking is not full, only the best of these scores are; equal ones are settled by `_Best`.
        """
        hits = self._hits[: scores.numel()].view(scores.shape)
        torch.gt(scores, floors[:, None], out=hits)
        if count < scores.shape[1] and torch.isneginf(floors).any():
            hits &= scores >= scores.topk(count, 1, sorted=True).values[:, -1:]
        return hits


class _Best:
    """The best passages of some queries so far; the best first, equal ones by number.

    Passages that are added wait until they are as many as the rankings hold, since all rankings are
    sorted at once. The rankings are the first half of three arrays, those that wait the second.

    Args:
        queries: The number of queries.
        count: Passages of a ranking.
    """

    def __init__(self, queries: int, count: int) -> None:
        self._shape, self._ranked, self._used = (queries, count), queries * count, queries * count
        self._owners = np.tile(np.repeat(np.arange(queries), count), 2)
        self._ids = np.full(2 * self._ranked, np.iinfo(np.int64).max)  # after all that exist
        self._scores = np.full(2 * self._ranked, -np.inf, np.float32)

    @property
    def floors(self) -> NDArray[np.float32]:
        """The lowest score of each ranking; -inf until it is full."""
        return self._scores[: self._ranked].reshape(self._shape)[:, -1].copy()

    def add(
        self, owners: NDArray[np.int64], ids: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> None:
        """Add passages with their scores for the queries `owners`."""
        done = 0
        while done < len(ids):
            part = slice(done, done + len(self._ids) - self._used)
            done += len(ids[part])
            free = slice(self._used, self._used + len(ids[part]))
            self._owners[free], self._ids[free] = owners[part], ids[part]
            self._scores[free] = scores[part]
            self._used = free.stop
            if self._used == len(self._ids):
                self._sort()

    def _sort(self) -> None:
        """Take what waits into the rankings."""
        ids, scores = self._ids[: self._used], self._scores[: self._used]
        owners, (queries, count) = self._owners[: self._used], self._shape
        order = np.lexsort((ids, -scores, owners))
        found = np.bincount(owners, minlength=queries)
        first = order[(np.cumsum(found) - found)[:, None] + np.arange(count)].reshape(-1)
        ids[: self._ranked], scores[: self._ranked] = ids[first], scores[first]
        self._used = self._ranked

    def rankings(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield the passages and the scores of each query."""
        self._sort()
        rankings = (a[: self._ranked].reshape(self._shape) for a in (self._ids, self._scores))
        for ids, scores in zip(*rankings, strict=True):
            yield ids[scores > -np.inf], scores[scores > -np.inf]


def positive_score(pool: Pool, queries: Vectors, passages: Vectors, number: int) -> float:
    """Return the lowest score among the positives of query `number`."""
    row = queries.rows(np.array([number]))[0]
    return float((passages.rows(pool.positives[number]) @ row).min(initial=np.inf))
