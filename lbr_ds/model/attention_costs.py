"""Which attention kernel is fastest for a batch: a cost rule over its segments' lengths.

A kernel's time on a batch is modelled as

    calls * call + pairs * pair + rows * row

where `calls` are kernel launches, `pairs` query-key pairs and `rows` the rows that it is given, the
last two times the width of the heads, so that the three constants belong to the device. They are
measured once (`attention_calibration.py`). One call for all segments is best for many short texts;
one call for each rectangle is best for few long ones, where its kernel is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

RECTANGLES, VARLEN = "rectangles", "varlen"


class Shape(Protocol):
    """What the rule reads of `Segments` (objectives/ib_segments.py); the host knows all of it."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The (n, L) of each rectangle."""
        ...

    @property
    def square_lengths(self) -> int:
        """The sum of the squares of the segments' lengths."""
        ...

    @property
    def num_rows(self) -> int:
        """The sum of their lengths."""
        ...


class Work(NamedTuple):
    """What a kernel has to do for a batch.

    Attributes:
        calls: kernel launches.
        pairs: query-key pairs, times heads x head size.
        rows: rows of queries, times heads x head size.
    """

    calls: float
    pairs: float
    rows: float


class Cost(NamedTuple):
    """The seconds that one unit of each part of a `Work` takes, forward and all gradients."""

    call: float
    pair: float
    row: float

    def seconds(self, work: Work) -> float:
        """Return the modelled time of `work`."""
        return work.calls * self.call + work.pairs * self.pair + work.rows * self.row


def work_of(kernel: str, segments: Shape, width: int) -> Work:
    """Return what `kernel` has to do for a batch; width: heads x head size of the queries."""
    if kernel == VARLEN:
        return Work(1, segments.square_lengths * width, segments.num_rows * width)
    pairs = sum(count * length * length for count, length in segments.shapes)
    rows = sum(count * length for count, length in segments.shapes)
    return Work(len(segments.shapes), pairs * width, rows * width)


@dataclass(frozen=True)
class Kernels:
    """The kernels that can be used on a device, with their costs."""

    costs: Mapping[str, Cost]

    def choose(self, segments: Shape, width: int) -> str:
        """Return the name of the fastest kernel for a batch."""
        if len(self.costs) == 1:
            return next(iter(self.costs))
        return min(
            self.costs, key=lambda name: self.costs[name].seconds(work_of(name, segments, width))
        )

    def __str__(self) -> str:
        if len(self.costs) == 1:
            return next(iter(self.costs))
        return "; ".join(
            f"{name} {cost.call * 1e6:.0f} us a call, {cost.pair * 1e18:.1f} as a pair and "
            f"{cost.row * 1e15:.1f} fs a row, for each element of the heads"
            for name, cost in self.costs.items()
        )


def fit(measured: Iterable[tuple[Work, float]]) -> Cost:
    """Fit a `Cost` to measured seconds: least squares of relative errors, no constant below 0."""
    works, seconds = zip(*measured, strict=True)
    relative = np.array(works, float) / np.array(seconds, float)[:, None]
    units = np.maximum(np.abs(relative).max(0), np.finfo(float).tiny)  # columns of like size
    used = [0, 1, 2]
    cost = np.zeros(3)
    while used:
        columns = relative[:, used] / units[used]
        found = np.linalg.lstsq(columns, np.ones(len(columns)), rcond=None)[0]
        if found.min() >= 0:
            cost[used] = found / units[used]
            break
        used.pop(int(found.argmin()))
    return Cost(*cost.tolist())
