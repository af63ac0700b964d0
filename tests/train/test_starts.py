"""A job that begins again and again at one step stops; a new one, or a person, gets through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_ds.distributed import World
from lbr_ds.errors import TrainingError
from lbr_ds.train.starts import NAME, note_start


def test_only_a_job_without_progress_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(step: int, job: str | None, restart: int) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        note_start(tmp_path, step, tmp_path / "backbone", World())

    for restart, step in enumerate([0, 0, 500, 500, 1000]):  # gets on, if slowly
        start(step, "7", restart)
    start(1000, "7", 5)
    start(1000, "7", 6)
    with pytest.raises(TrainingError, match=r"job 7 has started at step 1000 3 times .* again"):
        start(1000, "7", 7)
    with pytest.raises(TrainingError):
        start(1000, "7", 8)
    start(1000, "8", 0)  # submitted anew
    start(1000, "8", 1)
    start(1000, None, 0)  # by hand
    with (tmp_path / NAME).open("a") as file:
        file.write('{"step": 10')  # killed while it wrote
    start(1000, "8", 2)
    lines = (tmp_path / NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:5]] == [0, 0, 500, 500, 1000]
    assert json.loads(lines[0])["from"] == str(tmp_path / "backbone")
