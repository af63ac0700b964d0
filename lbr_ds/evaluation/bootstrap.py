"""Compare two models by their scores of single queries: a paired bootstrap.

Queries are drawn with replacement, the same ones for both models, so what makes a query hard for
both cancels out. This module needs numpy only, because reports use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_DRAWN_AT_ONCE = 4_000_000  # numbers: 32 MB


@dataclass(frozen=True)
class Comparison:
    """The mean of a minus b, its 95 % interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float
    queries: int


def compare(
    a: Mapping[str, float], b: Mapping[str, float], resamples: int = RESAMPLES, seed: int = 0
) -> Comparison | None:
    """Compare a with b over the queries that both have.

    Args:
        a: {query id: score}.
        b: {query id: score}.
        resamples: Number of bootstrap samples.
        seed: Of the samples.

    Returns:
        The interval is the bootstrap's 2.5 % to 97.5 % quantile. p is twice the share of resamples
        whose mean has the other sign or is 0, counted with one added, so it is never 0 and at most
        1. None for fewer than two common queries.
    """
    shared = [i for i in a if i in b]
    if len(shared) < 2:
        return None
    gains = np.array([a[i] - b[i] for i in shared])
    return _comparison(float(gains.mean()), resampled_means(gains, resamples, seed), len(shared))


def _comparison(difference: float, means: np.ndarray, queries: int) -> Comparison:
    """Return the comparison; means: (resamples,) of the difference."""
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(means) + 1))
    return Comparison(difference, float(low), float(high), p, queries)


def compare_gains(
    ours: tuple[Mapping[str, float], Mapping[str, float]],
    theirs: tuple[Mapping[str, float], Mapping[str, float]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison | None:
    """Compare the gain of a over b on one set of queries with that on another set.

    The sets have no query in common and are drawn independently; otherwise as `compare`.

    Args:
        ours: Scores (a, b) on the first set.
        theirs: Scores (a, b) on the second set.
        resamples: Number of bootstrap samples.
        seed: Of the samples.

    Returns:
        The first gain minus the second; None for fewer than two queries in either set.
    """
    sets = [[a[i] - b[i] for i in a if i in b] for a, b in (ours, theirs)]
    if min(map(len, sets)) < 2:
        return None
    first, second = map(np.array, sets)
    means = resampled_means(first, resamples, seed) - resampled_means(second, resamples, seed + 1)
    return _comparison(float(first.mean() - second.mean()), means, len(first) + len(second))


def interval(
    scores: Mapping[str, float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of {query id: score}; None for one query or none."""
    if len(scores) < 2:
        return None
    means = resampled_means(np.array(list(scores.values())), resamples, seed)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return (resamples,) means of `values` (n,), each over n values drawn with replacement."""
    return np.concatenate(list(_means(values, resamples, np.random.default_rng(seed))))


def _means(
    values: np.ndarray, resamples: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), len(values))
        yield values[generator.integers(0, len(values), size)].mean(1)
