"""Find near duplicates: candidates by MinHash and LSH over shingles, then the exact Jaccard index.

Two texts are near duplicates if their shingles (`segmentation.py`: pairs of words, and runs of
letters in scripts without spaces) have a Jaccard index of at least `data.near_duplicate`. At 0.7,
one word in eleven may differ; texts of up to ten words have no near duplicates but equal texts. 128
hash values in 32 bands of 4 rows find a pair at 0.7 with probability 0.9998, one at 0.6 with 0.99.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.system.process_pool import is_spread, map_in_order
from lbr_ds.system.progress import Progress, no_progress

PERMUTATIONS, BANDS = 128, 32
_ROWS = PERMUTATIONS // BANDS
SIGNATURE_BYTES = 4 * PERMUTATIONS
MARGIN = 0.16  # four standard deviations of an estimate from 128 values
_BLOCK = 128  # texts of a bucket compared with as many others at once
_PAIRS_AT_ONCE = 1 << 20  # of a union
_CHUNK = 4096  # signatures read at once
_BANDS_AT_ONCE = 4  # bands whose hashes are in memory, since the signatures are read for each
_PAIRS_PER_JOB = 1 << 15  # pairs of texts in one job, at most two blocks more
_BUCKETS_PER_JOB = 1 << 12  # buckets of two texts in one job


def signature(text: str) -> bytes:
    """Return the MinHash values of a text: SIGNATURE_BYTES bytes, the same on every machine.

    They are those of datasketch's `MinHash(128, seed=1, scheme="affine32")` over BLAKE2b hashes of
    4 bytes, without an object per text and without its import, which takes half a second.
    """
    runs = [blake2b(run.encode(), digest_size=4).digest() for run in shingles(text)]
    mixed = np.frombuffer(b"".join(runs), dtype="<u4")
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)  # the last steps of MurmurHash3
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    mixed ^= mixed >> 16
    factors, offsets = _permutations()
    values: NDArray[Any] = (mixed[:, None] * factors + offsets).min(axis=0)
    return values.astype("<u4", copy=False).tobytes()


@lru_cache(maxsize=1)
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the factors, which are odd, and the offsets of the permutations of 32-bit numbers."""
    draw = np.random.RandomState(1)  # its stream is frozen (NEP 19)
    factors = draw.randint(0, 1 << 31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, draw.randint(0, 1 << 32, PERMUTATIONS, dtype=np.uint32)


class Forest:
    """Disjoint sets (union-find) of the numbers below `size`; four bytes per number."""

    def __init__(self, size: int) -> None:
        self.parents = array("i", range(size))

    def root(self, node: int) -> int:
        """Return the representative of the set of `node`: its smallest number."""
        parents = self.parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def roots(self, nodes: NDArray[Any]) -> NDArray[np.int32]:
        """Return the representatives of the sets of all `nodes`."""
        parents = np.frombuffer(self.parents, np.int32)
        roots = parents[nodes]
        while not np.array_equal(above := parents[roots], roots):
            roots = above
        return roots

    def copy(self) -> Forest:
        """Return the same sets."""
        other = Forest(0)
        other.parents = self.parents[:]
        return other

    def unite_all(self, ones: NDArray[Any], others: NDArray[Any]) -> None:
        """Join the sets of each pair; many at once."""
        parents = np.frombuffer(self.parents, np.int32)
        for first in range(0, len(ones), _PAIRS_AT_ONCE):
            pairs = np.stack([a[first : first + _PAIRS_AT_ONCE] for a in (ones, others)])
            while pairs.size:
                roots = self.roots(pairs)
                parents[pairs] = roots  # shorter ways for later
                pairs = np.sort(roots[:, roots[0] != roots[1]], axis=0)
                np.minimum.at(parents, pairs[1], pairs[0])

    def unite(self, one: int, other: int) -> None:
        """Join the sets of both."""
        low, high = sorted((self.root(one), self.root(other)))
        self.parents[high] = low


class Comparison(NamedTuple):
    """What every process needs to compare texts.

    Attributes:
        signatures: The file of the texts' signatures, in the order of their numbers.
        threshold: The Jaccard index from which on two texts are near duplicates.
        text_of: Returns a text by its number, in any process.
    """

    signatures: Path
    threshold: float
    text_of: Callable[[int], str]

    def rows(self, file: BinaryIO, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Return the signatures of texts, (n, PERMUTATIONS) uint32."""
        # Not a memory map: its pages would count as memory of this process.
        raw = (
            os.pread(file.fileno(), SIGNATURE_BYTES, n * SIGNATURE_BYTES) for n in numbers.tolist()
        )
        return np.frombuffer(b"".join(raw), dtype="<u4").reshape(-1, PERMUTATIONS)


def families(comparison: Comparison, count: int, progress: Progress = no_progress) -> Forest:
    """Return the families of near duplicates among the texts 0..count-1, as transitive sets.

    Uses at most 60 bytes of memory per text, and a fixed amount per core. Any two texts of
    different families that agree in a band have been compared and differ: so the result does not
    depend on the order of the comparisons or the number of processes.
    """
    forest = Forest(count)
    if comparison.threshold >= 1:
        return forest
    found: Iterator[list[tuple[int, int]]]
    if is_spread():
        bands = (_Band(comparison, count, band) for band in range(BANDS))
        found = map_in_order(_compare_band, bands, phase="near duplicates")
    else:
        found = map_in_order(_compare, _jobs(comparison, count, forest, range(BANDS), progress))
    for near in found:
        for number, other in near:
            forest.unite(number, other)
    return forest


class _Band(NamedTuple):
    """All texts, to be compared where they agree in one band."""

    comparison: Comparison
    texts: int
    band: int


def _compare_band(job: _Band) -> list[tuple[int, int]]:
    """Return near duplicates that agree in a band: enough to join their families.

    Without the families that other bands have joined, more pairs are compared than by `families`
    in one process, and the union over all bands is the same.
    """
    forest = Forest(job.texts)
    near: list[tuple[int, int]] = []
    for part in _jobs(job.comparison, job.texts, forest, [job.band]):
        for pair in _compare(part):
            forest.unite(*pair)
            near.append(pair)
    return near


class _Block(NamedTuple):
    """Texts that agree in a band, and the roots of their families so far.

    With a cut, the texts before it are compared with those from it on; with 0, all with all.
    """

    numbers: NDArray[np.int64]
    roots: NDArray[np.int32]
    cut: int


class _Job(NamedTuple):
    """Texts that agree in a band: two in each row of `pairs`, (n, 2), and those of the blocks.

    Most buckets have two texts, and most of these are far from similar.
    """

    comparison: Comparison
    band: int
    pairs: NDArray[np.int64]
    blocks: list[_Block]


def _jobs(
    comparison: Comparison,
    count: int,
    forest: Forest,
    bands: Sequence[int],
    progress: Progress = no_progress,
) -> Iterator[_Job]:
    """Yield every pair of a bucket, unless both are of one family by then."""
    none = np.empty((0, 2), np.int64)
    for band, hashes in _hashes(comparison.signatures, count, bands):
        twos, larger = _buckets(hashes)
        for first in range(0, len(twos), _BUCKETS_PER_JOB):
            pairs = twos[first : first + _BUCKETS_PER_JOB]
            roots = forest.roots(pairs)
            if len(apart := pairs[roots[:, 0] != roots[:, 1]]):
                yield _Job(comparison, band, apart, [])
                progress("near duplicates", band, BANDS)
        blocks: list[_Block] = []
        cost = 0
        for numbers, cut in _parts(larger):
            roots = forest.roots(numbers)
            if (roots == roots[0]).all():
                continue
            blocks.append(_Block(numbers, roots, cut))
            cost += len(numbers) ** 2 // 2
            if cost >= _PAIRS_PER_JOB:
                yield _Job(comparison, band, none, blocks)
                blocks, cost = [], 0
                progress("near duplicates", band, BANDS)
        if blocks:
            yield _Job(comparison, band, none, blocks)
        progress("near duplicates", band + 1, BANDS)


def _parts(buckets: Iterator[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield (numbers, cut) of the buckets; large ones in blocks, each with each."""
    for numbers in buckets:
        firsts = range(0, len(numbers), _BLOCK)
        for first in firsts:
            own = numbers[first : first + _BLOCK]
            yield own, 0
            for later in firsts[first // _BLOCK + 1 :]:
                yield np.concatenate([own, numbers[later : later + _BLOCK]]), len(own)


def _compare(job: _Job) -> list[tuple[int, int]]:
    """Return the near duplicates of the job that join two families."""
    comparison, threshold = job.comparison, job.comparison.threshold
    runs = lru_cache(maxsize=2 * _BLOCK)(lambda n: shingles(comparison.text_of(n)))
    near: list[tuple[int, int]] = []
    with comparison.signatures.open("rb") as file:
        values = comparison.rows(file, job.pairs.ravel())
        for place in _likely(values[::2] == values[1::2], threshold, job.band).tolist():
            one, other = job.pairs[place].tolist()
            if jaccard(runs(one), runs(other)) >= threshold:
                near.append((one, other))
        for numbers, roots, cut in job.blocks:
            values = comparison.rows(file, numbers)
            # The most similar first: what they join need not be compared any more.
            for one, other in _likely_pairs(values, roots, cut, threshold, job.band):
                if roots[one] == roots[other]:
                    continue
                pair = int(numbers[one]), int(numbers[other])
                if jaccard(runs(pair[0]), runs(pair[1])) >= threshold:
                    near.append(pair)
                    roots[roots == roots[other]] = roots[one]
    return near


def _likely(same: NDArray[np.bool_], threshold: float, band: int) -> NDArray[np.int64]:
    """Return which rows of `same` are of possible near duplicates.

    Pairs that already agree in an earlier band are left out, since they were compared there.

    Args:
        same: In which values two signatures agree, (n, PERMUTATIONS).
        threshold: Of the Jaccard index.
        band: In which they agree.
    """
    likely = np.flatnonzero(same.sum(axis=1) >= (threshold - MARGIN) * PERMUTATIONS)
    earlier = same[likely, : band * _ROWS].reshape(len(likely), band, _ROWS)
    met: NDArray[Any] = np.any(np.all(earlier, axis=2), axis=1)
    return likely[~met]


def _likely_pairs(
    values: NDArray[Any], roots: NDArray[np.int32], cut: int, threshold: float, band: int
) -> list[tuple[int, int]]:
    """Return the positions of possible near duplicates in a block, the most similar first."""
    candidates: list[NDArray[np.int64]] = []
    for place in range(cut or len(values) - 1):
        start = max(cut, place + 1)
        apart = np.flatnonzero(roots[start:] != roots[place]) + start
        same = values[apart] == values[place]
        new = _likely(same, threshold, band)
        candidates.append(np.stack([-same[new].sum(axis=1), np.full(len(new), place), apart[new]]))
    pairs = np.concatenate(candidates, axis=1)
    order = np.lexsort(pairs[::-1])
    return [(one, other) for _, one, other in pairs[:, order].T.tolist()]


def _hashes(
    signatures: Path, count: int, bands: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield each band with the hashes of its values of each text."""
    for begin in range(0, len(bands), _BANDS_AT_ONCE):
        own = bands[begin : begin + _BANDS_AT_ONCE]
        hashes = np.zeros((len(own), count), dtype=np.uint64)
        with signatures.open("rb") as file:
            for first in range(0, count, _CHUNK):
                length = min(_CHUNK, count - first)
                part = np.fromfile(file, dtype="<u4", count=length * PERMUTATIONS)
                rows = part.reshape(length, BANDS, _ROWS)
                for mixed, band in zip(hashes[:, first : first + length], own, strict=True):
                    for row in rows[:, band].astype(np.uint64).T:
                        mixed ^= row
                        mixed *= np.uint64(0x9E3779B97F4A7C15)
                        mixed ^= mixed >> np.uint64(29)
        yield from zip(own, hashes, strict=True)


def _buckets(
    hashes: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], Iterator[NDArray[np.int64]]]:
    """Return the texts with equal hashes, in ascending order: pairs, (n, 2), and larger buckets."""
    order = np.argsort(hashes)
    hashes = hashes[order]
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
    lengths = np.diff(starts, append=len(order))
    twos = starts[lengths == 2]
    pairs = np.sort(np.stack([order[twos], order[twos + 1]], axis=1), axis=1)
    starts, lengths = starts[lengths > 2], lengths[lengths > 2]
    larger = (
        np.sort(order[start : start + length])
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    )
    return pairs, larger
