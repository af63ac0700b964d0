"""Which texts are nearly the same: MinHash over word pairs, then an exact count.

Two texts are near duplicates when their normalised word pairs (ends of the text counted as words)
have a Jaccard index of at least `data.near_duplicate`. At 0.7, one word in eleven may differ; texts
of up to ten words are near only to their equals. 128 hash values in 32 bands of 4 rows find a pair
at 0.7 with probability 0.9998, one at 0.6 with 0.99. Chinese, Japanese and Korean signs
count as words, since those texts have no blanks.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.cleaning import normalise

PERMUTATIONS, BANDS = 128, 32
_ROWS = PERMUTATIONS // BANDS
SIGNATURE_BYTES = 4 * PERMUTATIONS
_MARGIN = 0.16  # four standard deviations of an estimate from 128 values
_BLOCK = 1024  # signatures compared at once
_CHUNK = 16384  # signatures read at once
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\s\u3040-\u30ff"
                   r"\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+")  # fmt: skip


def pairs_of_words(text: str) -> set[str]:
    """The pairs of neighbouring words of the normalised text, its ends counted as words."""
    words = ["", *_WORD.findall(normalise(text)), ""]
    return {f"{one} {other}" for one, other in pairwise(words)}


def likeness(one: set[str], other: set[str]) -> float:
    """The Jaccard index of two sets of word pairs."""
    return len(one & other) / len(one | other)


def signature(text: str) -> bytes:
    """The MinHash values of a text: SIGNATURE_BYTES bytes, the same on every machine."""
    found = _empty().copy()
    found.update_batch([pair.encode() for pair in pairs_of_words(text)])
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


def families(
    signatures: Path,
    count: int,
    threshold: float,
    text_of: Callable[[int], str],
    progress: Callable[[int], None] = lambda band: None,
) -> Forest:
    """The texts 0..count-1 united where they are near duplicates, also by way of others.

    signatures: a file of `count` signatures. text_of gives a text by its number. Holds at most
    50 bytes a text in memory. After it, two texts of two families that share a band's values are
    compared and found to differ.
    """
    forest = Forest(count)
    if threshold >= 1:
        return forest
    with closing(_Comparison(signatures, threshold, text_of, forest)) as compare:
        for band in range(BANDS):
            progress(band)
            for bucket in _buckets(signatures, count, band):
                compare.bucket(bucket)
    return forest


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


class _Comparison:
    """Compares the texts of a bucket that are not in one family yet."""

    def __init__(
        self, signatures: Path, threshold: float, text_of: Callable[[int], str], forest: Forest
    ) -> None:
        self.signatures = signatures.open("rb")
        self.threshold = threshold
        self.forest = forest
        self.words = lru_cache(maxsize=256)(lambda number: pairs_of_words(text_of(number)))

    def close(self) -> None:
        """Close the file of signatures."""
        self.signatures.close()

    def bucket(self, numbers: NDArray[np.int64]) -> None:
        """Unite what is near among `numbers`; every pair of two families is compared."""
        roots = np.array([self.forest.root(number) for number in numbers.tolist()])
        if (roots == roots[0]).all():
            return
        for first in range(0, len(numbers), _BLOCK):
            values = self._values(numbers[first : first + _BLOCK])
            for later in range(first, len(numbers), _BLOCK):
                others = values
                if later > first:
                    others = self._values(numbers[later : later + _BLOCK])
                for place, own in enumerate(values, first):
                    self._one(numbers, roots, place, own, max(later, place + 1), others, later)

    def _one(
        self,
        numbers: NDArray[np.int64],
        roots: NDArray[np.int64],
        place: int,
        own: NDArray[Any],
        start: int,
        others: NDArray[Any],
        later: int,
    ) -> None:
        """Compare the text at `place` with those from `start` on whose values are in `others`."""
        apart = np.flatnonzero(roots[start : later + len(others)] != roots[place]) + start
        if not len(apart):
            return
        agree = (others[apart - later] == own).mean(axis=1)
        for at in apart[agree >= self.threshold - _MARGIN].tolist():
            if roots[at] == roots[place]:
                continue
            number, other = int(numbers[place]), int(numbers[at])
            if likeness(self.words(number), self.words(other)) >= self.threshold:
                self.forest.unite(number, other)
                low, high = sorted((int(roots[place]), int(roots[at])))
                roots[roots == high] = low

    def _values(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The signatures of texts. By pread: pages of a memory map would count as our memory."""
        descriptor = self.signatures.fileno()
        raw = (os.pread(descriptor, SIGNATURE_BYTES, n * SIGNATURE_BYTES) for n in numbers.tolist())
        return np.frombuffer(b"".join(raw), dtype="<u4").reshape(-1, PERMUTATIONS)
