"""A run that was stopped and resumed equals one that was not, parameters bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from lbr_ds.config import RunConfig
from lbr_ds.errors import SAVED_AND_STOPPED
from lbr_ds.runs import checkpoints
from tests.ranks import run_cli, start_cli, train_ranks

pytestmark = pytest.mark.slow

VOLATILE = (
    "tokens_per_second",
    "samples_per_second",
    "step_seconds",
    "data_wait_seconds",
    "memory_gib",
    "rank_seconds",
    "straggler",
    "slowest_rank",
    "save_seconds",
)


def metrics(folder: Path) -> list[dict[str, float]]:
    """Each step's numbers that do not depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]


def evaluations(folder: Path) -> list[dict[str, float]]:
    """Each evaluation's figures."""
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(folder: Path) -> bytes:
    return (checkpoints(folder)[-1] / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_equals_uninterrupted(trained: RunConfig, copied: Path, stage: int) -> None:
    folder = copied.parent / "run" / f"stage{stage}"
    last = checkpoints(folder)[-1]
    assert last.name == "step-000006"
    shutil.rmtree(last)
    assert "steps 3 to 6" in train_ranks(2, copied, stage)
    assert weights(folder) == weights(trained.run / f"stage{stage}")
    assert evaluations(folder) == evaluations(trained.run / f"stage{stage}")
    assert metrics(folder) == metrics(trained.run / f"stage{stage}")
    if stage == 2:  # from a teacher's scores, which some records lack
        assert all(line["distillation_loss"] > 0 for line in metrics(folder))
        assert all(0 < line["distilled"] < 1 for line in metrics(folder))


def test_preempted_run_saves_exits_85_and_resumes(trained: RunConfig, copied: Path) -> None:
    folder = copied.parent / "run" / "stage1"
    shutil.rmtree(folder)
    # Each step takes a second, so that the signals come before the last one.
    words = ["slow", "1", "0", "train", str(copied), "--stage", "1", "--nproc", "2"]
    module = "tests.training.faulty"
    running = start_cli(*words, "every.save=100", module=module, start_new_session=True)
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (path.exists() and path.read_text()):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    # A scheduler signals every process; the launcher passes it on, so that each rank has it twice.
    os.killpg(running.pid, signal.SIGTERM)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=240) == SAVED_AND_STOPPED
    stopped_at = len(metrics(folder))
    assert checkpoints(folder)[-1].name == f"step-{stopped_at:06d}"
    assert 1 <= stopped_at < 6
    done = run_cli("train", str(copied), "--stage", "1", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert weights(folder) == weights(trained.run / "stage1")
    assert metrics(folder) == metrics(trained.run / "stage1")


def test_only_the_last_k_checkpoints_stay(trained: RunConfig) -> None:
    names = [p.name for p in checkpoints(trained.run / "stage1")]
    assert names == ["step-000003", "step-000006"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["stage1.optim.lr=0.5"], "made with another recipe (stage1.optim.lr: 0.001 -> 0.5)"),
        (["seed=9"], "made with another recipe (seed: 0 -> 9)"),
    ],
)
def test_another_recipe_is_refused(copied: Path, change: list[str], message: str) -> None:
    before = weights(copied.parent / "run" / "stage1")
    done = run_cli("train", str(copied), "--stage", "1", "--nproc", "2", *change)
    assert done.returncode == 4
    assert message in done.stderr
    assert weights(copied.parent / "run" / "stage1") == before
