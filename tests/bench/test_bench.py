"""The form of what is measured; never how fast this machine is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbr_ds.bench import (
    SUITES,
    Row,
    Setting,
    Target,
    as_result,
    interleaved,
    loader,
    ratio,
    run_suite,
)
from lbr_ds.bench.run import Budget, measure_row
from lbr_ds.cli import app, run
from lbr_ds.cli.bench import show_bench
from lbr_ds.config import DataConfig
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError
from tests.ranks import run_cli
from tests.tiny import records

CONTRACT = ["measure", "value", "unit", "goal", "better", "floor"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus."""
    folder = tmp_path_factory.mktemp("bench")
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps(record) + "\n" for record in records(300)))
    data = DataConfig.model_validate(
        {"folder": folder / "data", "records_per_shard": 50, "sources": [{"path": str(raw)}]}
    )
    prepare(data, 0)
    return data.local_folder


def test_loader_rows(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loader.json"
    result = run_suite("loader", data=data, rounds=3, out=out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert list(result) == ["suite", "environment", "quick", "rows", "left_out"]
    assert result["environment"]["versions"]["webdataset"]
    assert result["left_out"] == []
    assert [list(row)[:6] for row in result["rows"]] == [CONTRACT] * 2
    wanted = {
        "loader_over_webdataset": (4.0, 6.0, "higher", 3),
        "seek_far_over_near": (1.2, 1.1, "lower", 3),
    }
    rows = [Row(**row) for row in result["rows"]]
    assert {row.measure: (row.floor, row.goal, row.better, row.rounds) for row in rows} == wanted
    for row in rows:
        assert row.value is not None
        assert math.isfinite(row.value)
        assert row.value > 0
        assert row.quartiles[0] <= row.value <= row.quartiles[1]
        assert row.unit == "ratio"
        assert row.about
        assert row.seconds
    show_bench(result)
    shown = capsys.readouterr().out
    assert all(row.measure in shown and row.about[:20] in shown for row in rows)


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The suite loader with a first row that works and a second one that does not."""
    asked: list[str] = []

    def measure(target: Target, setting: Setting) -> Row:
        asked.append(target.measure)
        if target.measure == "seek_far_over_near":
            raise RuntimeError("no\nsuch kernel")
        return target.row([1.0, 2.0], about="made up", first_seconds=3.0)

    monkeypatch.setattr(loader, "measure", measure)
    return asked


def test_rows_are_stored_one_by_one(two_rows: list[str], tmp_path: Path) -> None:
    """A file is whole after every row, and keeps its rows when the suite is run in pieces."""
    out = tmp_path / "loader.json"
    first, second = (target.measure for target in SUITES["loader"].targets)
    run_suite("loader", rows=[second], out=out)
    found = json.loads(out.read_text())
    assert [(r["measure"], r["value"]) for r in found["rows"]] == [(second, None)]
    assert found["rows"][0]["about"] == "not measured: RuntimeError: no such kernel"
    run_suite("loader", rows=[first], out=out)
    found = json.loads(out.read_text())
    assert [(r["measure"], r["value"]) for r in found["rows"]] == [(first, 1.5), (second, None)]
    assert two_rows == [second, first]
    # Rows of another machine are not mixed with those of this one.
    found["environment"]["processor"] = "another"
    out.write_text(json.dumps(found))
    run_suite("loader", rows=[first], out=out)
    assert [r["measure"] for r in json.loads(out.read_text())["rows"]] == [first]


def test_a_file_is_whole_while_a_row_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "loader.json", []

    def measure(target: Target, setting: Setting) -> Row:
        seen.append(json.loads(out.read_text()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return target.row([1.0], about="made up")

    monkeypatch.setattr(loader, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run_suite("loader", out=out)
    first, second = (target.measure for target in SUITES["loader"].targets)
    found = json.loads(out.read_text())
    assert ([r["measure"] for r in found["rows"]], found["left_out"]) == ([first], [second])
    assert [(len(s["rows"]), len(s["left_out"])) for s in seen] == [(0, 2), (1, 1)]


def test_a_row_is_not_begun_when_it_cannot_end_in_time(two_rows: list[str]) -> None:
    result = run_suite("loader", minutes=0)
    assert two_rows == result["rows"] == []
    assert result["left_out"] == [target.measure for target in SUITES["loader"].targets]
    assert run_suite("loader", minutes=600)["left_out"] == []


def test_a_row_that_outlives_the_budget_is_abandoned() -> None:
    setting, closed = Setting(), []

    @contextmanager
    def resource() -> Iterator[str]:
        yield "held"
        closed.append(True)

    def measure(target: Target, setting: Setting) -> Row:
        assert setting.shared("key", resource) == "held"
        while True:
            time.sleep(0.01)

    target = SUITES["loader"].targets[0]
    assert measure_row(measure, target, setting, Budget(minutes=0)) is None
    assert closed == [True]


def test_one_value_is_shared_at_a_time() -> None:
    setting, events = Setting(), []

    @contextmanager
    def resource(name: str) -> Iterator[str]:
        events.append(f"open {name}")
        yield name
        events.append(f"close {name}")

    for name in ("a", "a", "b"):
        assert setting.shared(name, lambda name=name: resource(name)) == name
    setting.release()
    assert events == ["open a", "close a", "open b", "close b"]


def test_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"higher": (7.0, 5.0, 3.0), "lower": (1.0, 1.15, 1.3)}
    limits = {"higher": {"goal": 6.0, "floor": 4.0}, "lower": {"goal": 1.1, "floor": 1.2}}
    for better in ("higher", "lower"):
        rows = [
            ratio("m", [(value, 1.0)], better=better, about="", **limits[better])  # type: ignore[arg-type]
            for value in values[better]
        ]
        show_bench(as_result("made-up", rows))
        lines = capsys.readouterr().out.splitlines()
        shown = [line for line in lines if line.split()[:1] == ["m"]]
        for line, verdict in zip(shown, ("goal", "must", "miss"), strict=True):
            assert verdict in line


def test_interleaved_takes_turns_and_keeps_sides() -> None:
    calls: list[str] = []

    def side(name: str, figure: float) -> float:
        calls.append(name)
        return figure

    pairs = interleaved(lambda: side("a", 6.0), lambda: side("b", 2.0), 3)
    assert pairs == [(6.0, 2.0)] * 3
    assert "".join(calls) == "ababbaab"
    row = ratio(
        "m", [(2.0, 1.0), (9.0, 3.0), (4.0, 1.0)], goal=1, better="lower", floor=1, about=""
    )
    assert (row.value, row.quartiles, row.rounds) == (3.0, (2.5, 3.5), 3)


def test_unknown_names_are_one_line_with_the_nearest_ones() -> None:
    with pytest.raises(ConfigError, match="unknown suite 'x'; known: gpu, host, loader"):
        run_suite("x")
    with pytest.raises(ConfigError, match="--row seek: there is no such row; did you mean seek_"):
        run_suite("loader", rows=["seek"])
    done = run_cli("bench", "loadr")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "lbr-ds: error: unknown suite 'loadr'; did you mean 'loader'?"
    ]


@pytest.mark.parametrize("name", SUITES)
def test_help_and_list_of_a_suite_name_its_rows(name: str) -> None:
    help_text, listed = (
        CliRunner().invoke(app, ["bench", name, option]).output for option in ("--help", "--list")
    )
    assert f"Usage: lbr-ds bench {name} [OPTIONS]" in help_text.replace("root", "lbr-ds")
    for target in SUITES[name].targets:
        assert target.measure in "".join(help_text.split())
        assert target.measure in listed


def test_a_row_that_fails_ends_in_an_error(
    two_rows: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "loader", "--json", str(tmp_path / "x.json")]) == 6
    shown = capfd.readouterr()
    assert "1 row(s) could not be measured: seek_far_over_near" in shown.err
    assert "not measured: RuntimeError: no such kernel" in shown.out
