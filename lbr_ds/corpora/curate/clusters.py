"""Divide families of near duplicates into clusters: a leader and its own near duplicates.

A family is transitive, as is necessary for texts that must stay in one split. In a corpus made from
templates, distant members of a family may have little in common. A cluster is not transitive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.near_duplicates import BANDS, MARGIN, PERMUTATIONS, Comparison
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.system.process_pool import map_in_order

MOST = 16384  # texts of a family clustered at once; a larger one is cut to bound memory
_TEXTS_PER_JOB = 2048  # texts in one job, or one family
_FEW = 32  # texts of a family that are compared with each other at once


class _Job(NamedTuple):
    comparison: Comparison
    families: list[NDArray[np.int64]]


def cluster_families(
    comparison: Comparison, families: Iterator[NDArray[np.int64]]
) -> Iterator[list[tuple[int, int]]]:
    """Yield (text, leader of its cluster) for every text of the families, some families at a time.

    Leaders are chosen in the order of how many others of the family a text shares bands with, so
    that clusters form around the texts that were copied most. A text that is near to several
    leaders joins the first.

    Args:
        comparison: Signatures, threshold and texts.
        families: The numbers of each family's texts, in an order that does not depend on them.
    """
    return map_in_order(_work, _jobs(comparison, families), phase="clusters")


def _jobs(comparison: Comparison, families: Iterator[NDArray[np.int64]]) -> Iterator[_Job]:
    waiting: list[NDArray[np.int64]] = []
    for family in families:
        for first in range(0, len(family), MOST):
            waiting.append(family[first : first + MOST])
            if sum(map(len, waiting)) >= _TEXTS_PER_JOB:
                yield _Job(comparison, waiting)
                waiting = []
    if waiting:
        yield _Job(comparison, waiting)


def _work(job: _Job) -> list[tuple[int, int]]:
    with job.comparison.signatures.open("rb") as file:
        return [
            pair
            for family in job.families
            for pair in _cluster(job.comparison, family, job.comparison.rows(file, family))
        ]


def _cluster(
    comparison: Comparison, numbers: NDArray[np.int64], values: NDArray[np.uint32]
) -> Iterator[tuple[int, int]]:
    """Yield (text, leader) for the texts `numbers`, whose signatures are the rows of `values`."""
    free = np.ones(len(numbers), bool)
    for leader in np.argsort(-_copies(values), kind="stable"):
        if not free[leader]:
            continue
        free[leader] = False
        yield int(numbers[leader]), int(numbers[leader])
        others = np.flatnonzero(free)
        agree = (values[others] == values[leader]).mean(axis=1)
        likely = others[agree >= comparison.threshold - MARGIN]
        runs = shingles(comparison.text_of(int(numbers[leader]))) if len(likely) else set()
        for at in likely:
            other = int(numbers[at])
            if jaccard(runs, shingles(comparison.text_of(other))) >= comparison.threshold:
                free[at] = False
                yield other, int(numbers[leader])


def _copies(values: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return for each text with how many others it agrees in a band, summed over the bands."""
    rows = PERMUTATIONS // BANDS
    if len(values) <= _FEW:
        same = (values[:, None] == values).reshape(len(values), len(values), BANDS, rows)
        copies: NDArray[np.int64] = same.all(axis=3).sum(axis=(1, 2)) - BANDS
        return copies
    copies = np.zeros(len(values), np.int64)
    for band in range(BANDS):
        part = np.ascontiguousarray(values[:, band * rows : (band + 1) * rows])
        whole = part.view(np.dtype((np.void, part.itemsize * rows))).ravel()
        _, which, counts = np.unique(whole, return_inverse=True, return_counts=True)
        copies += counts[which] - 1
    return copies
