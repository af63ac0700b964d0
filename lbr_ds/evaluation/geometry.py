"""Measure the shape of the embedding space, without any ranking.

Pure functions on numpy arrays, without mteb and torch: training uses them, too. No array of size
(N, N) is held: sums suffice for the distances, the rest is computed in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

_TILE = 2048  # rows and columns of one block of similarities: 16 MiB
_SAMPLE = 10_000  # passages that uniformity uses, evenly spaced: pairs grow with the square

Indices = Sequence[Sequence[int]]


class Matrix(Protocol):
    """(N, D): an array, or rows that are read when they are indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


MEASURES = ("separation_ratio", "alignment", "uniformity", "effective_rank")


def measure(
    queries: np.ndarray, passages: Matrix, own: Indices, mates: Indices
) -> dict[str, float | None]:
    """Return the four measures below of one held-out set; None where one is not defined.

    Args:
        queries: (Q, D), any float dtype and length; normalised here.
        passages: (N, D), likewise; what is no array is read in parts. Uniformity uses at most
            10,000 of them, evenly spaced.
        own: For each query the indices of its relevant passages.
        mates: For each query the indices of passages that count neither as its own nor as others.
    """
    queries = normalised(queries)
    passages = normalised(passages) if isinstance(passages, np.ndarray) else _Normalised(passages)
    some = passages[np.linspace(0, len(passages) - 1, min(len(passages), _SAMPLE)).astype(int)]
    values = {
        "separation_ratio": separation_ratio(queries, passages, own, mates),
        "alignment": alignment(queries, passages, own),
        "uniformity": uniformity(some),
        "effective_rank": effective_rank(passages),
    }
    return {k: round(v, 5) if math.isfinite(v) else None for k, v in values.items()}


def separation_ratio(queries: np.ndarray, passages: Matrix, own: Indices, mates: Indices) -> float:
    """Return the mean cosine distance of a query to other passages, over that to its own.

    The paper (section 3) names a Separation Ratio, but the available text does not define it. Here:
    each query's mean distance to its own passages (`own`) and to all others except `mates`; both
    are averaged over the queries, then divided. 1: a query is as far from its own as from any other
    passage; larger is better. queries (Q, D) and passages (N, D) are normalised. Queries without
    another passage are ignored; NaN when none is left, inf when all coincide with their own.
    """
    total = _sum(passages)
    near, far = [], []
    for query, mine, others in zip(queries.astype(np.float64), own, mates, strict=True):
        mine = list(mine)
        apart = list(dict.fromkeys([*mine, *others]))
        rest = len(passages) - len(apart)
        if not mine or not rest:
            continue
        near.append(1 - (passages[mine] @ query).mean())
        # All others at once: the sum over everything, less what does not count.
        far.append(1 - (total @ query - (passages[apart] @ query).sum()) / rest)
    if not near:
        return math.nan
    distance = float(np.mean(near))
    return float(np.mean(far)) / distance if distance > 1e-12 else math.inf


def alignment(queries: np.ndarray, passages: Matrix, own: Indices) -> float:
    """Return the mean squared distance of a query to its passages (Wang and Isola 2020, alpha 2).

    For normalised vectors: 0 when each pair coincides, 2 when unrelated. NaN without pairs.
    """
    rows = [i for i, mine in enumerate(own) for _ in mine]
    columns = [j for mine in own for j in mine]
    if not rows:
        return math.nan
    sums = [
        float(np.square(queries[rows[s : s + _TILE]] - passages[columns[s : s + _TILE]]).sum())
        for s in range(0, len(rows), _TILE)
    ]
    return math.fsum(sums) / len(rows)


def uniformity(vectors: np.ndarray) -> float:
    """Return log of the mean of exp(-2 |x - y|^2) over all pairs (Wang and Isola 2020, t = 2).

    vectors (N, D) are normalised: 0 when all coincide (collapse), lower when they spread over the
    sphere; about -4 at best in many dimensions. NaN for fewer than two vectors.
    """
    count = len(vectors)
    if count < 2:
        return math.nan
    total = 0.0
    for i in range(0, count, _TILE):
        for j in range(i, count, _TILE):
            cosines = vectors[i : i + _TILE] @ vectors[j : j + _TILE].T
            kernel = np.exp(4 * (cosines.astype(np.float64) - 1))
            # On the diagonal a tile holds each pair twice, and each vector with itself.
            total += (kernel.sum() - np.trace(kernel)) / 2 if i == j else kernel.sum()
    return math.log(total / (count * (count - 1) / 2))


def effective_rank(vectors: Matrix) -> float:
    """Return exp of the entropy of the singular values' shares (Roy and Vetterli 2007).

    vectors (N, D) are not centred: 1 when all are parallel (collapse), D when every direction is
    used equally. NaN for vectors that are all zero.
    """
    gram = np.zeros((vectors.shape[1],) * 2)
    for start in range(0, len(vectors), _TILE):
        tile = vectors[start : start + _TILE].astype(np.float64)
        gram += tile.T @ tile
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    if not singular.sum() > 0:
        return math.nan
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return math.exp(-(shares * np.log(shares)).sum())


def _sum(vectors: Matrix) -> np.ndarray:
    """Return the sum of all rows, (D,) float64, added one after the other."""
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), _TILE):
        tile = vectors[start : start + _TILE].astype(np.float64)
        total = np.concatenate([total[None], tile]).sum(0)
    return total


class _Normalised:
    """Rows that are normalised when they are read."""

    def __init__(self, rows: Matrix) -> None:
        self._rows, self.shape = rows, rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return normalised(self._rows[index])


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Return (N, D) float32 of unit length; a zero vector stays zero."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
