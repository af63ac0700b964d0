"""The form of what is measured; never how fast this machine is."""

from __future__ import annotations

import json
import math

import pytest

from lbr_ds.bench import Row, as_result, interleaved, ratio, run_suite
from lbr_ds.bench.loader import QUICK, suite
from lbr_ds.cli.bench import show_bench
from lbr_ds.config import DataConfig
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError
from tests.ranks import run_cli
from tests.tiny import records

CONTRACT = ["measure", "value", "unit", "goal", "better", "floor"]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The short version of the suite on a small corpus."""
    folder = tmp_path_factory.mktemp("bench")
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps(record) + "\n" for record in records(300)))
    data = DataConfig.model_validate(
        {"folder": folder / "data", "records_per_shard": 50, "sources": [{"path": str(raw)}]}
    )
    prepare(data, 0)
    return suite(data.local_folder, **QUICK)


def test_loader_rows(loader: list[Row]) -> None:
    wanted = {
        "loader_over_webdataset": (4.0, 6.0, "higher", 3),
        "seek_far_over_near": (1.2, 1.1, "lower", 3),
    }
    found = {row.measure: (row.floor, row.goal, row.better, row.rounds) for row in loader}
    assert found == wanted
    for row in loader:
        assert math.isfinite(row.value)
        assert row.value > 0
        assert row.quartiles[0] <= row.value <= row.quartiles[1]
        assert row.unit == "ratio"
        assert row.about


def test_result_is_json_of_the_agreed_form(
    loader: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads(json.dumps(as_result("loader", loader)))
    assert list(result) == ["suite", "environment", "rows"]
    assert result["environment"]["versions"]["webdataset"]
    assert [list(row)[:6] for row in result["rows"]] == [CONTRACT] * 2
    show_bench(result)
    shown = capsys.readouterr().out
    assert all(row.measure in shown and row.about[:20] in shown for row in loader)


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


def test_unknown_suite_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown suite 'loadr'; did you mean 'loader'"):
        run_suite("loadr")
    with pytest.raises(ConfigError, match="unknown suite 'x'; known: gpu, loader"):
        run_suite("x")
    done = run_cli("bench", "loadr")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "lbr-ds: error: unknown suite 'loadr'; did you mean 'loader'?"
    ]
