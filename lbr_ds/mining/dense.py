"""Exact search by inner product, block by block: every query meets every passage.

Memory: (QUERIES, BLOCKS * ROWS) scores and the block that they come from, whatever the corpus: with
4096 dimensions about 70 MB. The rankings of QUERIES queries are stored in `WORK/KEY/00000.npz` ...,
in one rename each: ranks share them, and a killed run resumes after its last complete one. A block
of scores is one product of the same shape either way, so the result does not depend on the ranks.

No approximate index is used: the pool of one domain is small enough, and an exact search gives the
same negatives on every machine. FAISS's exact index is not used either. On 50,000 passages of 384
dimensions, 2048 queries and one thread it takes 0.54 of the time (faiss-cpu 1.15), but it breaks
ties differently (in 7 of 2048 queries), rounds by its own BLAS, and would make the negatives depend
on what is installed. Encoding the texts takes far longer than either.
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

from lbr_ds.distributed import World
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking, best
from lbr_ds.mining.vectors import Vectors
from lbr_ds.system.atomic import atomic_file
from lbr_ds.system.progress import Progress, no_progress

QUERIES = 1024  # at once
BLOCKS = 8  # of passages that are scored before the best are taken
_Best = tuple[NDArray[np.int64], NDArray[np.float32]]  # passages and scores, the best first


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
    for start in range(0, queries.count, QUERIES):
        yield from _stored(pool, queries, passages, count, start, folder)
        progress("search", min(start + QUERIES, queries.count), queries.count)


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
    for start in range(world.rank * QUERIES, queries.count, world.size * QUERIES):
        _stored(pool, queries, passages, count, start, folder)
        progress("search", min(start + QUERIES, queries.count), queries.count)


def rank_key(pool: Pool, queries: Vectors, passages: Vectors, count: int) -> str:
    """Return 20 hex digits that identify the vectors, what is excluded, and `count`."""
    names = f"{queries.folder.name} {passages.folder.name} {count} {QUERIES} {BLOCKS}"
    digest = hashlib.sha256(names.encode())
    for query in range(len(pool.queries)):
        digest.update(pool.banned(query).tobytes() + b"/" + pool.positives[query].tobytes() + b"\n")
    return digest.hexdigest()[:20]


def _stored(
    pool: Pool, queries: Vectors, passages: Vectors, count: int, start: int, folder: Path
) -> list[Ranking]:
    """Return the rankings of the queries from `start` on; make and store them when missing."""
    path = folder / f"{start // QUERIES:05d}.npz"
    numbers = np.arange(start, min(start + QUERIES, queries.count))
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
    found: list[_Best] = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in numbers]
    banned = [pool.banned(number) for number in numbers.tolist()]
    for first, scores in _scores(rows, passages):
        for i, columns, values in _above(scores, found, count):
            ids = first + columns
            kept = ~np.isin(ids, banned[i], assume_unique=True)
            ids, values = np.concatenate([found[i][0], ids[kept]]), values[kept]
            found[i] = best(np.concatenate([found[i][1], values]), ids, count)
    return [
        Ranking(*found[i], positive_score(pool, queries, passages, number))
        for i, number in enumerate(numbers.tolist())
    ]


def _above(
    scores: torch.Tensor, found: list[_Best], count: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (query, columns, scores) of what may be among the best of each query.

    Only scores above the lowest of `count` are: an equal one has a higher number. They are selected
    on the device, so that few leave it after the first blocks.
    """
    floors = [values[-1] if len(values) == count else -np.inf for _, values in found]
    for i in np.flatnonzero(np.isneginf(floors)).tolist():
        yield i, np.arange(scores.shape[1]), scores[i].cpu().numpy()
    floor = torch.tensor(floors, dtype=torch.float32, device=scores.device)
    hits = (scores > floor[:, None]) & ~torch.isneginf(floor)[:, None]
    rows, columns = (part.cpu().numpy() for part in hits.nonzero(as_tuple=True))
    values = scores[hits].cpu().numpy()  # in the order of `nonzero`
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    ends = np.append(starts, len(rows))[1:]
    for begin, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield int(rows[begin]), columns[begin:end], values[begin:end]


def _scores(rows: torch.Tensor, passages: Vectors) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (number of the first passage, scores of the queries `rows` for the next passages)."""
    parts = passages.parts()
    while several := list(islice(parts, BLOCKS)):
        blocks = (torch.from_numpy(np.array(block)).to(rows.device) for _, block in several)
        yield several[0][0], torch.cat([rows @ block.T for block in blocks], 1)


def positive_score(pool: Pool, queries: Vectors, passages: Vectors, number: int) -> float:
    """Return the lowest score among the positives of query `number`."""
    row = queries.rows(np.array([number]))[0]
    return float((passages.rows(pool.positives[number]) @ row).min(initial=np.inf))
