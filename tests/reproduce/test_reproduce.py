"""`lbr-ds reproduce table3` by the command line on a tiny recipe; a second call trains nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lbr_ds import reproduce as room
from lbr_ds.errors import LbrError
from lbr_ds.reproduce import reproduce
from tests.ranks import run_cli
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow

VARIANTS = ["LLM", "LLM+GL", "LLM+IB-GL", "LLM+CL", "LLM+GL+CL", "LLM+IB-GL+CL"]


def test_table_3_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path, prepared=False, stage1__num_steps=3, stage2__num_steps=3)
    out = tmp_path / "table3.json"
    done = run_cli("reproduce", "table3", str(recipe), "--nproc", "1", "--json", str(out))
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
    assert ["LLM+IB-GL+CL", "LLM+CL"] in [[c["a"], c["b"]] for c in result["comparisons"]]
    assert result["separation_predicts"]["runs"] == 2
    for name in VARIANTS:
        assert f"| {name} | " in done.stdout
    folder = tmp_path / "run" / "reproduce" / "table3"
    assert (folder / "RESULT.md").read_text() in done.stdout
    assert (folder / "result.png").is_file()
    learnt = [job for job in room.list_jobs("table3", str(recipe)) if not job.endswith(": done")]
    assert learnt == []

    # Again: nothing is trained or scored. Without one stage 2: that alone is trained.
    asked: list[tuple[str, ...]] = []

    def refuse(*words: str) -> None:
        asked.append(words)
        raise LbrError("no more training")

    monkeypatch.setattr(room, "run_verb", refuse)
    again = reproduce("table3", str(recipe))
    assert again is not None
    assert again["rows"] == result["rows"]
    assert asked == []
    lost = Path(result["rows"][-1]["folder"])
    shutil.rmtree(lost)
    with pytest.raises(LbrError, match="no more training"):
        reproduce("table3", str(recipe))
    ((verb, *words),) = asked
    assert verb == "train"
    assert f"run={lost}" in words
    assert words[-2:] == ["--stage", "2"]
