"""The paired bootstrap against cases that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lbr_ds.evaluation.bootstrap import compare, compare_gains, interval, resampled_means


def test_two_queries_have_three_resamples() -> None:
    """Gains 3 and -1: means 3, 1, -1 with probabilities 1/4, 1/2, 1/4, so p is 2/4."""
    found = compare({"x": 3.0, "y": 0.0}, {"x": 0.0, "y": 1.0})
    assert found is not None
    assert found.difference == 1
    assert (found.low, found.high, found.queries) == (-1, 3, 2)
    assert found.p == pytest.approx(0.5, abs=0.02)
    back = compare({"x": 0.0, "y": 1.0}, {"x": 3.0, "y": 0.0})
    assert back is not None
    assert (back.difference, back.low, back.high) == (-1, -3, 1)
    assert back.p == pytest.approx(found.p)


def test_ends() -> None:
    a = {f"q{i}": 0.5 for i in range(9)}
    same = compare(a, a)
    assert same is not None
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    always = compare(a, dict.fromkeys(a, 0.25))
    assert always is not None
    assert (always.difference, always.low, always.high) == (0.25, 0.25, 0.25)
    assert always.p == pytest.approx(2 / 10_001)
    assert compare(a, {"other": 1.0}) is None
    assert compare({"x": 1.0}, {"x": 0.0}) is None


def test_pairing_takes_out_what_queries_share() -> None:
    rng = np.random.default_rng(0)
    hard = {f"q{i}": float(x) for i, x in enumerate(rng.normal(size=400))}
    better = {i: x + 0.05 + 0.1 * float(rng.normal()) for i, x in hard.items()}
    paired = compare(better, hard)
    assert paired is not None
    assert paired.p < 0.001
    # The spread of a mean is the values' own over the root of their number.
    low, high = interval(hard) or (0, 0)
    expected = 2 * 1.96 * np.std(list(hard.values())) / 20
    assert high - low == pytest.approx(expected, rel=0.05)
    assert high - low > 5 * (paired.high - paired.low)


def test_drawn_in_parts_and_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = resampled_means(values, 1000, 0)
    monkeypatch.setattr("lbr_ds.evaluation.bootstrap._DRAWN_AT_ONCE", 700)
    assert np.array_equal(resampled_means(values, 1000, 0), whole)
    assert not np.array_equal(resampled_means(values, 1000, 1), whole)


def test_gains_on_two_sets_of_queries() -> None:
    """Gains 3 and -1 on one, 1 and 1 on the other: means 2, 0, -2 with 1/4, 1/2, 1/4."""
    ours = ({"x": 3.0, "y": 0.0}, {"x": 0.0, "y": 1.0})
    theirs = ({"z": 1.0, "w": 2.0}, {"z": 0.0, "w": 1.0})
    found = compare_gains(ours, theirs)
    assert found is not None
    assert (found.difference, found.low, found.high, found.queries) == (0, -2, 2, 4)
    assert found.p == 1
    # The variance of a difference of means is the sum of theirs.
    rng = np.random.default_rng(1)
    sets = [
        ({f"{k}{i}": float(x) for i, x in enumerate(rng.normal(k, s, 300))}, s)
        for k, s in ((1, 1.0), (0, 2.0))
    ]
    (a, one), (b, two) = sets
    wide = compare_gains((a, dict.fromkeys(a, 0.0)), (b, dict.fromkeys(b, 0.0)))
    assert wide is not None
    assert wide.high - wide.low == pytest.approx(
        2 * 1.96 * np.sqrt((one**2 + two**2) / 300), rel=0.15
    )
    assert compare_gains(ours, ({"z": 1.0}, {"z": 0.0})) is None
