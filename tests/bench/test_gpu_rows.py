"""`lbr-ds bench gpu --quick --row ROW`, each row in a process of its own as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_ds.bench import SUITES
from tests.ranks import run_cli

TRAIN = "train_tokens_per_second"
ROWS = [target.measure for target in SUITES["gpu"].targets if target.measure != TRAIN]


@pytest.mark.parametrize(
    "name", [TRAIN, *(pytest.param(row, marks=pytest.mark.suites) for row in ROWS)]
)
def test_a_row_alone(name: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run_cli("bench", "gpu", "--quick", "--row", name, "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["left_out"] == []
    (row,) = result["rows"]
    assert (row["measure"], result["quick"]) == (name, True)
    assert row["value"] > 0
    assert row["seconds"] > 0
    assert name in done.stdout
