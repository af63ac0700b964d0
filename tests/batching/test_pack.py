"""Which sequences share a micro-batch: each once, within the budget, in few micro-batches."""

from __future__ import annotations

import random

import pytest

from lbr_ds.batching import Sequence, fill_by_tokens, split_by_tokens


def sequences(*lengths: int) -> list[Sequence]:
    return [Sequence([0] * length, 1) for length in lengths]


def test_long_and_short_ones_fill_each_other_up() -> None:
    assert fill_by_tokens(sequences(6, 5, 4, 5), 10) == [[0, 2], [1, 3]]
    assert len(split_by_tokens(sequences(6, 5, 4, 5), 10)) == 3


def test_one_longer_than_the_budget_is_alone() -> None:
    assert fill_by_tokens(sequences(3, 12, 7), 10) == [[1], [0, 2]]


def test_nothing_to_fill() -> None:
    assert fill_by_tokens([], 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_each_once_within_the_budget_and_few(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [min(64, 1 + int(rng.lognormvariate(3, 1))) for _ in range(rng.randrange(1, 80))]
    made = sequences(*lengths)
    batches = fill_by_tokens(made, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for batch in batches)
    assert all(sum(lengths[i] for i in batch) <= 64 for batch in batches)
    # Best fit with the longest first needs at most 11/9 of the fewest, and 6/9 more.
    fewest = max(-(-sum(lengths) // 64), sum(length > 32 for length in lengths))
    assert len(batches) <= 11 / 9 * fewest + 6 / 9
    assert len(batches) <= len(split_by_tokens(made, 64))
    assert fill_by_tokens(made, 64) == batches
