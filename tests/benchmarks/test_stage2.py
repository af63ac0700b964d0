"""Rows of the suites `stage2`, `encode` and of stage 2's peers, at a small scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_ds.bench import Row
from lbr_ds.errors import DataError, LbrError
from tests.benchmarks import encode, peers_stage2, stage2
from tests.benchmarks.texts import pairs
from tests.tiny import records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(120)))
    return path


def check(rows: list[Row], wanted: dict[str, tuple[float, float, str]]) -> None:
    assert {row.measure: (row.floor, row.goal, row.better) for row in rows} == wanted
    for row in rows:
        assert row.value > 0
        assert row.quartiles[0] <= row.value <= row.quartiles[1]
        assert row.about


@pytest.mark.suites
def test_stage2_rows(data: Path) -> None:
    rows = stage2.suite(data, **stage2.QUICK)
    check(
        rows,
        {
            "infonce_memory_4k": (0.25, 0.10, "lower"),
            "gradcache_memory_16x": (1.10, 1.05, "lower"),
            "gradcache_over_oneshot": (1.40, 1.30, "lower"),
            "matryoshka_over_plain": (1.10, 1.02, "lower"),
            "matryoshka_loss_over_plain": (3.0, 1.5, "lower"),
            "gradcache_zero3_grad_error": (1e-5, 1e-6, "lower"),
        },
    )
    by_name = {row.measure: row for row in rows}
    assert by_name["gradcache_zero3_grad_error"].value <= 1e-5  # an equality, not a time
    assert by_name["gradcache_over_oneshot"].theory == 4 / 3


@pytest.mark.slow
def test_encode_row(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = encode.suite(data, **encode.QUICK)
    check(rows, {"encode_over_st": (1.0, 1.15, "higher")})
    assert rows[0].theory is not None
    assert rows[0].theory > 1
    monkeypatch.setattr(encode, "CLOSE", -1.0)
    with pytest.raises(LbrError, match="the two sides' vectors differ by"):
        encode.suite(data, **encode.QUICK)


@pytest.mark.suites
def test_peers_rows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = peers_stage2.rows(data, **peers_stage2.QUICK)
    check(
        rows,
        {
            "stage2_over_st": (1.3, 1.8, "higher"),
            "stage2_cached_over_st_cached": (1.3, 1.8, "higher"),
        },
    )
    monkeypatch.setattr(peers_stage2, "CLOSE", -1.0)
    with pytest.raises(LbrError, match="losses differ: ours"):
        peers_stage2.rows(data, **peers_stage2.QUICK)


def test_pairs_are_spread_evenly_and_distinct(data: Path) -> None:
    found = pairs(data, 40)
    assert [record.id for record in found] == [f"r{i * 3}" for i in range(40)]
    with pytest.raises(DataError, match="120 distinct pairs, 121 are needed"):
        pairs(data, 121)
