"""How far the order spreads the samples of a shard; orders that shuffle less are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lbr_ds.shards import order as order_module
from lbr_ds.shards.order import BLOCK, SHARDS, WINDOW, Order, permutation
from tests.shards.quality import Quality, distinct_shards, quality

RECORDS, SHARD_COUNT, LANES = 512, 384, 16  # a lane's chunk is three windows of eight shards


def made() -> Order:
    return Order([RECORDS] * SHARD_COUNT, seed=3, lanes=LANES)


def measure() -> Quality:
    return quality(made(), range(4), range(3 * WINDOW))


def faults(found: Quality) -> set[str]:
    """The figures that are outside what draws at random give: four standard errors, or theory."""
    expected_span = WINDOW * (RECORDS - 1) / (RECORDS + 1)  # of the extremes of uniform draws
    inside = {
        "span": abs(found.span - expected_span) < 0.01 * WINDOW,
        "neighbours": found.neighbours < 4 / np.sqrt(3 * WINDOW),
        "unevenness": 0.6 < found.unevenness < 0.9,
        "files": found.files < 4 / np.sqrt(4 * SHARD_COUNT / LANES),
    }
    return {name for name, well in inside.items() if not well}


def test_a_lane_draws_at_random_within_its_window() -> None:
    assert faults(measure()) == set()


def test_the_samples_of_a_step_are_of_different_shards() -> None:
    """As many as there are lanes, where no shard is in the chunks of two lanes."""
    assert distinct_shards(made(), range(200)) == 1
    assert distinct_shards(Order([RECORDS] * 4, seed=3, lanes=LANES), range(200)) == 1


def in_turn(length: int) -> np.ndarray:
    """One record of each shard of a window after the other."""
    return np.arange(length).reshape(-1, RECORDS).T.reshape(-1)


@pytest.mark.parametrize(
    ("purpose", "bad", "noticed"),
    [
        (BLOCK, np.arange, {"span", "neighbours", "unevenness"}),
        (BLOCK, in_turn, {"neighbours", "unevenness"}),
        (SHARDS, np.arange, {"files"}),
        (SHARDS, lambda length: np.arange(length)[::-1], {"files"}),
    ],
)
def test_an_order_that_shuffles_less_is_noticed(
    monkeypatch: pytest.MonkeyPatch, purpose: int, bad: Any, noticed: set[str]
) -> None:
    def worse(length: int, seed: int, what: int, *numbers: int) -> np.ndarray:
        return bad(length) if what == purpose else permutation(length, seed, what, *numbers)

    monkeypatch.setattr(order_module, "permutation", worse)
    assert faults(measure()) == noticed


@pytest.mark.parametrize("window", [1, 64, 1024])
def test_a_smaller_window_is_noticed(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(order_module, "WINDOW", window)
    assert "span" in faults(measure())
