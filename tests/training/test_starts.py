"""What stage 2 starts from, that the best one is kept, and jobs that restart without progress."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, TrainingError
from lbr_ds.runs import best_first, checkpoints, saved
from lbr_ds.training.checkpoint.writing import prune, seal
from lbr_ds.training.starts import NAME, note_start, starting_point
from tests.ranks import train_ranks

pytestmark = pytest.mark.slow


def plant(folder: Path, step: int, ratio: float | None, queries: int = 9) -> Path:
    """A whole checkpoint of `RUN/stage1` with these figures."""
    made = folder / "checkpoints" / f"step-{step:06d}"
    made.mkdir(parents=True)
    figures = {"separation_ratio": ratio, "queries": queries, "passages": 20}
    facts: dict[str, Any] = {"step": step, "evaluation": figures if queries else {}}
    (made / "state.json").write_text(json.dumps(facts))
    (made / "files.json").write_text(json.dumps({"state.json": seal(made / "state.json")}))
    return made


@pytest.fixture
def run(trained: RunConfig, tmp_path: Path) -> RunConfig:
    """A run without any checkpoint."""
    return load(trained.run / "recipe.yaml", [f"run={tmp_path / 'run'}"])


def chosen(run: RunConfig, source: str) -> str:
    run = run.model_copy(update={"stage2": run.stage2.model_copy(update={"start_from": source})})
    return starting_point(run, 2, World()).name


def test_the_best_by_separation_ratio(run: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    stage1 = run.run / "stage1"
    for step, ratio in ((100, 1.2), (200, 1.5), (300, 1.5), (400, 1.1), (500, None)):
        plant(stage1, step, ratio)
    plant(stage1, 600, None, queries=0)  # saved on a signal
    with caplog.at_level(logging.INFO, "lbr_ds"):
        assert run.stage2.start_from == "best"
        assert chosen(run, "best") == "step-000300"
    assert "Separation Ratio 1.500, the best of 4 evaluated" in caplog.text
    assert chosen(run, "last") == "step-000600"
    assert chosen(run, "200") == "step-000200"
    assert chosen(run, "backbone") == "backbone"
    assert [p.name[-3:] for p in best_first(checkpoints(stage1))] == ["300", "200", "100", "400"]


def test_a_damaged_one_is_passed_over(run: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    stage1 = run.run / "stage1"
    for step, ratio in ((100, 1.2), (200, 1.5), (300, 1.1)):
        plant(stage1, step, ratio)
    state = saved(stage1)[1] / "state.json"
    state.write_text(state.read_text().replace("200", "201"))
    assert chosen(run, "best") == "step-000100"
    assert "step-000200 is damaged and skipped: state.json" in caplog.text
    for path in saved(stage1):
        (path / "files.json").unlink()
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        chosen(run, "best")


def test_figures_of_another_sample_are_not_compared(run: RunConfig) -> None:
    plant(run.run / "stage1", 100, 9.9, queries=5)
    plant(run.run / "stage1", 200, 1.2)
    plant(run.run / "stage1", 300, 1.1)
    assert chosen(run, "best") == "step-000200"


def test_where_none_is_evaluated_it_is_the_last(
    run: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (100, 200):
        plant(run.run / "stage1", step, None, queries=0)
    with caplog.at_level(logging.INFO, "lbr_ds"):
        assert chosen(run, "best") == "step-000200"
    assert "the last: no complete one has been evaluated" in caplog.text


@pytest.mark.parametrize("source", ["best", "last", "7", "nowhere"])
def test_nothing_to_start_from_is_one_line(run: RunConfig, source: str) -> None:
    with pytest.raises(CheckpointError, match=rf"stage2.from={source}: .*stage2.from=backbone"):
        chosen(run, source)


def test_the_best_one_stays(tmp_path: Path) -> None:
    """Through every save, however few are kept; unless nobody asked for it."""
    ratios = {100: 1.2, 200: 1.9, 300: 1.1, 400: 1.3, 500: 2.0, 600: 1.0}
    left = []
    for step, ratio in ratios.items():
        prune(plant(tmp_path, step, ratio), keep=1, keep_every=None, keep_best=True)
        left.append([int(p.name[-3:]) for p in checkpoints(tmp_path)])
    assert left == [[100], [200], [200, 300], [200, 400], [500], [500, 600]]
    prune(checkpoints(tmp_path)[-1], keep=1, keep_every=None, keep_best=False)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000600"]


def test_training_keeps_it_and_says_where_it_starts(trained: RunConfig) -> None:
    stage1 = trained.run / "stage1"
    best = best_first(checkpoints(stage1))[0]
    first, *_ = (trained.run / "stage2" / "starts.jsonl").read_text().splitlines()
    assert json.loads(first)["from"] == str(best)
    assert f"stage 2 starts from {best}" in (trained.run / "stage2/log/rank-1.log").read_text()


def test_once_begun_stage_2_needs_stage_1_no_more(copied: Path) -> None:
    folder = copied.parent / "run"
    shutil.rmtree(folder / "stage1")
    shutil.rmtree(checkpoints(folder / "stage2")[-1])
    train_ranks(2, copied, 2)
    lines = (folder / "stage2" / "starts.jsonl").read_text().splitlines()
    stages = [Path(json.loads(line)["from"]).parent.parent.name for line in lines]
    assert (stages[0], stages[-1]) == ("stage1", "stage2")


def test_only_a_job_without_progress_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(step: int, job: str | None, restart: int) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        note_start(tmp_path, step, tmp_path / "backbone", World())

    for restart, step in enumerate([0, 0, 500, 500, 1000]):  # slow progress
        start(step, "7", restart)
    start(1000, "7", 5)
    start(1000, "7", 6)
    with pytest.raises(TrainingError, match=r"job 7 has started at step 1000 3 times .* again"):
        start(1000, "7", 7)
    with pytest.raises(TrainingError):
        start(1000, "7", 8)
    start(1000, "8", 0)  # submitted again
    start(1000, "8", 1)
    start(1000, None, 0)  # by hand
    with (tmp_path / NAME).open("a") as file:
        file.write('{"step": 10')  # killed while it wrote
    start(1000, "8", 2)
    lines = (tmp_path / NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:5]] == [0, 0, 500, 500, 1000]
    assert json.loads(lines[0])["from"] == str(tmp_path / "backbone")
