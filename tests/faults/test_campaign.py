"""The short version of the suite `faults`: killed, signalled, resized, damaged, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_ds.bench import Row
from tests.faults.campaign import SHORT, suite
from tests.faults.compare import steps_not_once, wrong_samples

suites = pytest.mark.suites  # the suite kills runs for minutes


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.measure: row for row in suite(SHORT)}


@suites
def test_nothing_is_lost(rows: dict[str, Row]) -> None:
    wanted = {
        "kills": sum(SHORT.kills),
        "lost_steps": 0,
        "differing_bits": 0,
        "save_kills": SHORT.save_kills,
        "unloadable": 0,
    }
    assert {name: rows[name].value for name in wanted} == wanted, rows


@suites
def test_every_fault_is_named(rows: dict[str, Row]) -> None:
    assert rows["faults_injected"].value == 10
    assert rows["faults_named"].value == rows["faults_injected"].value, rows["faults_named"]


@suites
def test_another_number_of_ranks_gives_the_same_weights(rows: dict[str, Row]) -> None:
    assert 0 <= rows["world_change_max_relative_error"].value <= 1e-6


@suites
def test_rows_of_times_are_there(rows: dict[str, Row]) -> None:
    """How long things take is for the long version to judge."""
    assert {"signal_to_exit_excess_s", "async_stall_over_sync"} < rows.keys()


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A step taken twice, one never taken, a sample drawn otherwise."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n{"step": 3}\n')
    assert steps_not_once(tmp_path, 3) == 2
    for name, drawn in (("a", {"0": "r1", "1": "r2"}), ("b", {"0": "r1", "1": "r9"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples-0.jsonl").write_text(json.dumps([0, drawn]) + "\n")
    assert wrong_samples(tmp_path / "a", tmp_path / "b") == 1
    assert wrong_samples(tmp_path / "a", tmp_path / "a") == 0
