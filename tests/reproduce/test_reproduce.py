"""`lbr-ds reproduce table2` by the command line on a tiny recipe, two jobs at once.

A second call trains nothing; jobs that are lost are trained again, with the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lbr_ds import reproduce as room
from lbr_ds.errors import LbrError
from lbr_ds.reproduce import reproduce
from tests.ranks import run_cli
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow

VARIANTS = ["Base", "GL", "CL", "IB-GL", "LBR"]


def test_table_2_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path, prepared=False, stage1__num_steps=3, stage2__num_steps=3)
    out = tmp_path / "table2.json"
    words = ("reproduce", "table2", str(recipe), "--nproc", "1", "--json", str(out))
    done = run_cli(*words, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["variant"] for row in result["rows"]] == VARIANTS
    for row in result["rows"]:
        assert row["seed"] == 0
        assert 0 <= row["ndcg_at_10"] <= row["recall_at_10"] <= 1
        assert row["separation_ratio"] > 0
    for c in result["comparisons"]:
        assert {"a", "b", "difference", "p"} <= set(c)
        assert 0 < c["p"] <= 1
    assert ["LBR", "CL"] in [[c["a"], c["b"]] for c in result["comparisons"]]
    assert result["separation_predicts"]["runs"] == 1
    for name in VARIANTS:
        assert f"| {name} | " in done.stdout
    folder = tmp_path / "run" / "reproduce" / "table2"
    assert (folder / "RESULT.md").read_text() in done.stdout
    assert (folder / "result.png").is_file()
    learnt = [job for job in room.list_jobs("table2", str(recipe)) if not job.endswith(": done")]
    assert learnt == []

    # Again: nothing is trained or scored. Without one stage 2: that alone is trained.
    asked: list[tuple[str, ...]] = []

    def refuse(*words: str) -> None:
        asked.append(words)
        raise LbrError("no more training")

    monkeypatch.setattr(room, "run_verb", refuse)
    again = reproduce("table2", str(recipe))
    assert again is not None
    assert again["rows"] == result["rows"]
    assert asked == []
    lost = Path(result["rows"][-1]["folder"])
    shutil.rmtree(lost)
    with pytest.raises(LbrError, match="no more training"):
        reproduce("table2", str(recipe))
    (training,) = asked
    assert training[0] == "train"
    assert f"run={lost}" in training
    assert training[-2:] == ("--stage", "2")


@pytest.mark.suites
def test_one_job_after_another_gives_the_numbers_of_two_at_once(tmp_path: Path) -> None:
    """Two stages that are lost are trained again, alone."""
    recipe = tiny_recipe(tmp_path, prepared=False, stage1__num_steps=3, stage2__num_steps=3)
    out = tmp_path / "table2.json"
    words = ("reproduce", "table2", str(recipe), "--nproc", "1", "--json", str(out))
    done = run_cli(*words, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    before = digests(result)
    for row in (3, -1):
        shutil.rmtree(result["rows"][row]["folder"])
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    alone = json.loads(out.read_text())
    for row in (*alone["rows"], *result["rows"]):
        row.pop("stage1_seconds", None)
    for key in ("rows", "comparisons", "separation_predicts"):
        assert alone[key] == result[key]
    assert digests(alone) == before


def digests(result: dict[str, Any]) -> dict[str, str]:
    """The hash of every weight file of the trained rows."""
    files = [
        file
        for row in result["rows"]
        for file in Path(row["folder"]).glob("stage?/checkpoints/*/model/*.safetensors")
    ]
    assert len(files) == 5  # rows of two stages link to their stage 1
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
