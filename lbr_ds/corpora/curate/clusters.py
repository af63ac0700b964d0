"""A family of near duplicates -> clusters, each of a leader and texts that are near to it itself.

Families unite by way of others, which is right for what must not be parted between splits. On
texts made from templates they chain far: the ends have little in common. A cluster does not chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.near_duplicates import BANDS, MARGIN, PERMUTATIONS, Shared
from lbr_ds.corpora.curate.segmentation import likeness, shingles
from lbr_ds.corpora.process_pool import map_in_order

MOST = 16384  # texts of a family clustered at once; a larger family is cut, which bounds memory
_A_JOB = 2048  # texts in one job, or one family


class _Job(NamedTuple):
    shared: Shared
    families: list[NDArray[np.int64]]


def stars(shared: Shared, families: Iterator[NDArray[np.int64]]) -> Iterator[list[tuple[int, int]]]:
    """(text, leader of its cluster) for every text of the families, some families at a time.

    families: the numbers of each one's texts in an order that does not depend on the numbers. The
    texts lead in the order of how many others of the family they share bands with, so a cluster
    forms around what is most copied. A text that is near to several leaders joins the first.
    """
    return map_in_order(_work, _jobs(shared, families))


def _jobs(shared: Shared, families: Iterator[NDArray[np.int64]]) -> Iterator[_Job]:
    waiting: list[NDArray[np.int64]] = []
    for family in families:
        for first in range(0, len(family), MOST):
            waiting.append(family[first : first + MOST])
            if sum(map(len, waiting)) >= _A_JOB:
                yield _Job(shared, waiting)
                waiting = []
    if waiting:
        yield _Job(shared, waiting)


def _work(job: _Job) -> list[tuple[int, int]]:
    with job.shared.signatures.open("rb") as file:
        return [
            pair
            for family in job.families
            for pair in _cluster(job.shared, family, job.shared.rows(file, family))
        ]


def _cluster(
    shared: Shared, numbers: NDArray[np.int64], values: NDArray[np.uint32]
) -> Iterator[tuple[int, int]]:
    """(text, leader) for the texts `numbers`, whose signatures are the rows of `values`."""
    free = np.ones(len(numbers), bool)
    for leader in np.argsort(-_copies(values), kind="stable"):
        if not free[leader]:
            continue
        free[leader] = False
        yield int(numbers[leader]), int(numbers[leader])
        others = np.flatnonzero(free)
        agree = (values[others] == values[leader]).mean(axis=1)
        likely = others[agree >= shared.threshold - MARGIN]
        runs = shingles(shared.text_of(int(numbers[leader]))) if len(likely) else set()
        for at in likely:
            other = int(numbers[at])
            if likeness(runs, shingles(shared.text_of(other))) >= shared.threshold:
                free[at] = False
                yield other, int(numbers[leader])


def _copies(values: NDArray[np.uint32]) -> NDArray[np.int64]:
    """For each text, with how many others it agrees in a band, summed over the bands."""
    found = np.zeros(len(values), np.int64)
    rows = PERMUTATIONS // BANDS
    for band in range(BANDS):
        part = np.ascontiguousarray(values[:, band * rows : (band + 1) * rows])
        whole = part.view(np.dtype((np.void, part.itemsize * rows))).ravel()
        _, which, counts = np.unique(whole, return_inverse=True, return_counts=True)
        found += counts[which] - 1
    return found
