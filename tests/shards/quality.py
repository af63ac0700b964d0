"""How well an order shuffles: figures over some steps of it, for the test and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lbr_ds.shards.order import Order


@dataclass(frozen=True)
class Quality:
    """What `steps` steps of an order look like.

    Attributes:
        span: Steps between the first and the last sample of a shard that was drawn completely:
            the median over these shards.
        neighbours: The autocorrelation at lag 1 of a lane's record numbers within a shard: 1 in
            file order, 0 in random order. The largest of the lanes' absolute values.
        unevenness: The Kolmogorov-Smirnov distance between the steps of a shard's samples and an
            even spread over its span, times the square root of their number: the median over the
            shards that were drawn completely. About 0.7 for draws at random within one window, 0
            for draws in turn.
        files: The absolute correlation between the number of a shard and its place in the epoch: 1
            in file order.
    """

    span: float
    neighbours: float
    unevenness: float
    files: float


def quality(order: Order, lanes: range, steps: range) -> Quality:
    """Measure the samples of `lanes` at `steps`, all of one epoch."""
    places = np.array([[order.place(lane, step) for lane in lanes] for step in steps])
    assert len(np.unique(places[..., 0])) == 1
    shards, records = places[..., 1], places[..., 2]
    spans, uneven = [], []
    for lane in range(len(lanes)):
        for shard, count in zip(*np.unique(shards[:, lane], return_counts=True), strict=True):
            drawn = np.flatnonzero(shards[:, lane] == shard)
            if count < order.counts[shard]:
                continue
            spans.append(drawn[-1] - drawn[0] + 1)
            inner = (drawn - drawn[0]) / (drawn[-1] - drawn[0])
            uneven.append(np.sqrt(count) * np.abs(inner - np.linspace(0, 1, count)).max())
    return Quality(
        float(np.median(spans)),
        max(abs(_lag_1(records[:, lane])) for lane in range(len(lanes))),
        float(np.median(uneven)),
        abs(float(np.corrcoef(shards.T.reshape(-1), np.arange(shards.size))[0, 1])),
    )


def distinct_shards(order: Order, steps: range) -> float:
    """Return the fewest distinct shards in a step, over the most that are possible."""
    fewest = min(
        len({order.place(lane, step).shard for lane in range(order.lanes)}) for step in steps
    )
    return fewest / min(order.lanes, len(order.counts))


def _lag_1(values: np.ndarray) -> float:
    return float(np.corrcoef(values[:-1], values[1:])[0, 1])
