"""Which texts are nearly the same: MinHash over shingles, then an exact count.

Two texts are near duplicates when their shingles (`segment.py`: pairs of words, and runs of letters
in scripts without blanks) have a Jaccard index of at least `data.near_duplicate`. At 0.7, one word
in eleven may differ; texts of up to ten words are near only to their equals. 128 hash values in 32
bands of 4 rows find a pair at 0.7 with probability 0.9998, one at 0.6 with 0.99.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.segmentation import likeness, shingles
from lbr_ds.corpora.process_pool import map_in_order
from lbr_ds.system.progress import Progress, no_progress

PERMUTATIONS, BANDS = 128, 32
_ROWS = PERMUTATIONS // BANDS
SIGNATURE_BYTES = 4 * PERMUTATIONS
MARGIN = 0.16  # four standard deviations of an estimate from 128 values
_BLOCK = 128  # texts of a bucket compared with as many others at once
_CHUNK = 16384  # signatures read at once
_A_JOB = 1 << 15  # pairs of texts in one job, at most two blocks more


def signature(text: str) -> bytes:
    """The MinHash values of a text: SIGNATURE_BYTES bytes, the same on every machine."""
    found = _empty().copy()
    found.update_batch([run.encode() for run in shingles(text)])
    return np.asarray(found.hashvalues, dtype="<u4").tobytes()


@lru_cache(maxsize=1)
def _empty() -> Any:
    from datasketch import MinHash  # brings scipy; a reused folder should not wait for that

    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=_hash32)


def _hash32(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=4).digest(), "little")


class Forest:
    """Disjoint sets of the numbers below `size`; four bytes a number."""

    def __init__(self, size: int) -> None:
        self.parents = array("i", range(size))

    def root(self, node: int) -> int:
        """The number that stands for the set of `node`: its smallest."""
        parents = self.parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def unite(self, one: int, other: int) -> None:
        """Make the sets of both one."""
        low, high = sorted((self.root(one), self.root(other)))
        self.parents[high] = low


class Shared(NamedTuple):
    """What every job needs to compare texts: a file of their signatures, the bound, and a text by
    its number, in any process."""

    signatures: Path
    threshold: float
    text_of: Callable[[int], str]

    def rows(self, file: BinaryIO, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The signatures of texts. By pread: pages of a memory map would count as our memory."""
        raw = (
            os.pread(file.fileno(), SIGNATURE_BYTES, n * SIGNATURE_BYTES) for n in numbers.tolist()
        )
        return np.frombuffer(b"".join(raw), dtype="<u4").reshape(-1, PERMUTATIONS)


def families(shared: Shared, count: int, progress: Progress = no_progress) -> Forest:
    """The texts 0..count-1 united where they are near duplicates, also by way of others.

    Holds at most 50 bytes a text in memory, and a fixed amount a core. After it, two texts of two
    families that share a band's values were compared and found to differ: so the result is the
    same in whatever order, and by however many processes, the pairs were looked at.
    """
    forest = Forest(count)
    if shared.threshold >= 1:
        return forest
    for united in map_in_order(_compare, _jobs(shared, count, forest, progress)):
        for number, other in united:
            forest.unite(number, other)
    return forest


class _Block(NamedTuple):
    """Texts that agree in a band, and their families' roots so far.

    With a cut, those before it are compared with those from it on; without, all with all.
    """

    numbers: NDArray[np.int64]
    roots: NDArray[np.int64]
    cut: int


class _Job(NamedTuple):
    shared: Shared
    band: int
    blocks: list[_Block]


def _jobs(shared: Shared, count: int, forest: Forest, progress: Progress) -> Iterator[_Job]:
    """Every pair of a bucket, unless one family has both when the job is asked for."""
    for band in range(BANDS):
        blocks: list[_Block] = []
        cost = 0
        for numbers, cut in _parts(_buckets(shared.signatures, count, band)):
            roots = np.array([forest.root(number) for number in numbers.tolist()])
            if (roots == roots[0]).all():
                continue
            blocks.append(_Block(numbers, roots, cut))
            cost += len(numbers) ** 2 // 2
            if cost >= _A_JOB:
                yield _Job(shared, band, blocks)
                blocks, cost = [], 0
                progress("near duplicates", band, BANDS)
        if blocks:
            yield _Job(shared, band, blocks)
        progress("near duplicates", band + 1, BANDS)


def _parts(buckets: Iterator[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """(numbers, cut): the buckets, large ones in blocks of which each meets each."""
    for numbers in buckets:
        firsts = range(0, len(numbers), _BLOCK)
        for first in firsts:
            own = numbers[first : first + _BLOCK]
            yield own, 0
            for later in firsts[first // _BLOCK + 1 :]:
                yield np.concatenate([own, numbers[later : later + _BLOCK]]), len(own)


def _compare(job: _Job) -> list[tuple[int, int]]:
    """The pairs of the job that are near and unite two families."""
    runs = lru_cache(maxsize=2 * _BLOCK)(lambda n: shingles(job.shared.text_of(n)))
    found: list[tuple[int, int]] = []
    with job.shared.signatures.open("rb") as file:
        for numbers, roots, cut in job.blocks:
            values = job.shared.rows(file, numbers)
            # The likeliest first: what they unite need not be compared any more.
            for one, other in _likely(values, roots, cut, job.shared.threshold, job.band):
                if roots[one] == roots[other]:
                    continue
                pair = int(numbers[one]), int(numbers[other])
                if likeness(runs(pair[0]), runs(pair[1])) >= job.shared.threshold:
                    found.append(pair)
                    roots[roots == roots[other]] = roots[one]
    return found


def _likely(
    values: NDArray[Any], roots: NDArray[np.int64], cut: int, threshold: float, band: int
) -> list[tuple[int, int]]:
    """The places of pairs that may be near and meet here first, the most alike before others."""
    found: list[NDArray[np.int64]] = []
    for place in range(cut or len(values) - 1):
        start = max(cut, place + 1)
        apart = np.flatnonzero(roots[start:] != roots[place]) + start
        same = values[apart] == values[place]
        alike = same.sum(axis=1)
        # A pair that agrees in an earlier band was compared there.
        met = same[:, : band * _ROWS].reshape(len(apart), band, _ROWS).all(axis=2).any(axis=1)
        new = np.flatnonzero((alike >= (threshold - MARGIN) * PERMUTATIONS) & ~met)
        found.append(np.stack([-alike[new], np.full(len(new), place), apart[new]]))
    pairs = np.concatenate(found, axis=1)
    order = np.lexsort(pairs[::-1])
    return [(one, other) for _, one, other in pairs[:, order].T.tolist()]


def _buckets(signatures: Path, count: int, band: int) -> Iterator[NDArray[np.int64]]:
    """The numbers of the texts that agree in a band, two or more at a time."""
    hashes = np.empty(count, dtype=np.uint64)
    with signatures.open("rb") as file:
        for first in range(0, count, _CHUNK):
            length = min(_CHUNK, count - first)
            part = np.fromfile(file, dtype="<u4", count=length * PERMUTATIONS)
            rows = part.reshape(length, PERMUTATIONS)[:, band * _ROWS : (band + 1) * _ROWS]
            mixed = np.zeros(length, dtype=np.uint64)
            for row in rows.astype(np.uint64).T:
                mixed = (mixed ^ row) * np.uint64(0x9E3779B97F4A7C15)
                mixed ^= mixed >> np.uint64(29)
            hashes[first : first + length] = mixed
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
    ends = np.append(starts[1:], count)
    del hashes
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            yield order[start:end]
