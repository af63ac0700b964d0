"""Locks: who holds one, who takes one over, the error of a second process."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
from pathlib import Path

import pytest

from lbr_ds.config import load
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import locks as ownership
from lbr_ds.system.locks import lock_folder
from tests.kills.crash import run
from tests.tiny import tiny_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def hold(folder: Path, *, beside: bool = False) -> int:
    """A process that holds the lock until it is killed; returns its id once it has it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(folder, beside=beside):
            os.write(writer, b"!")
            signal.pause()
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.close(reader)
    return child


def end(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def stranger(folder: Path, **facts: object) -> None:
    """A lock that a process elsewhere has left behind, or still holds."""
    folder.mkdir()
    owner = {
        "host": "elsewhere",
        "pid": 4711,
        "started": 1.0,
        "user": "ada",
        "command": "lbr-ds train",
        "since": "2026-11-28 06:00:00 +0000",
        "job": "",
        "restart": 0,
        "step": "",
        **facts,
    }
    (folder / ".lbr-lock").write_text(json.dumps(owner))


def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int = 0) -> None:
    """SLURM's answer to whether a job or a step runs."""
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    stream = "2" if code else "1"
    program.write_text(f"#!/bin/sh\necho '{says}' >&{stream}\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("beside", [False, True])
def test_a_second_process_is_told_who_is_there(folder: Path, beside: bool) -> None:
    process = hold(folder, beside=beside)
    told = rf"run is in use by `.*` \(process {process} on .*, user .*\), since 20.*; do this "
    try:
        with (
            pytest.raises(EnvironmentProblem, match=told),
            lock_folder(folder, beside=beside, cure="do this"),
        ):
            pytest.fail("entered")
    finally:
        end(process)


@pytest.mark.parametrize("beside", [False, True])
def test_the_lock_of_a_killed_process_is_taken_over_and_removed(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("lbr_ds"), "propagate", True)
    caplog.set_level(logging.INFO)
    process = hold(folder, beside=beside)
    end(process)
    with lock_folder(folder, beside=beside), lock_folder(folder, beside=beside):
        assert "taken over from `" in caplog.text
        assert f"process {process} on" in caplog.text
    assert not list(folder.parent.glob("**/.*"))


def test_a_fork_of_the_owner_does_not_keep_the_lock(folder: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(folder):
            loader = os.fork()
            if loader == 0:
                signal.pause()
            os.write(writer, str(loader).encode())
            signal.pause()
    loader = int(os.read(reader, 20))
    end(child)
    try:
        with lock_folder(folder):
            pass
    finally:
        os.kill(loader, signal.SIGKILL)


def test_without_locks_in_the_file_system_the_process_is_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "try_flock", lambda descriptor: None)
    process = hold(folder)
    with pytest.raises(EnvironmentProblem, match=f"process {process} on"), lock_folder(folder):
        pytest.fail("entered")
    end(process)
    with lock_folder(folder):
        pass
    assert not list(folder.iterdir())


def test_a_local_lock_that_nobody_holds_is_free(folder: Path) -> None:
    stranger(folder)
    with lock_folder(folder):
        pass


def test_a_lock_that_may_be_held_elsewhere_is_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "flock_reaches_all_hosts", lambda place: False)
    stranger(folder)
    told = "process 4711 on elsewhere, user ada.*remove .*run/.lbr-lock"
    with pytest.raises(EnvironmentProblem, match=told), lock_folder(folder):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("says", "code", "taken"),
    [
        ("", 0, True),
        ("slurm_load_jobs error: Invalid job id specified", 1, True),
        ("7 main train ada R 1:00 1 n1", 0, False),
        ("Unable to contact slurm controller", 1, False),
    ],
)
def test_slurm_says_whether_a_job_on_another_node_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, taken: bool
) -> None:
    monkeypatch.setattr(ownership, "flock_reaches_all_hosts", lambda place: False)
    squeue(tmp_path, monkeypatch, says, code)
    stranger(folder, job="7")
    if taken:
        with lock_folder(folder):
            pass
    else:
        with pytest.raises(EnvironmentProblem, match="SLURM job 7"), lock_folder(folder):
            pytest.fail("entered")


@pytest.mark.parametrize("still_locked", [False, True])
def test_a_requeued_job_takes_its_own_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch, still_locked: bool
) -> None:
    """Also while the server keeps the flock of the node that was lost."""
    monkeypatch.setattr(ownership, "flock_reaches_all_hosts", lambda place: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    process = 0
    if still_locked:
        process = hold(folder)
        facts = json.loads((folder / ".lbr-lock").read_text())
        (folder / ".lbr-lock").write_text(json.dumps({**facts, "host": "elsewhere", "restart": 0}))
    else:
        stranger(folder, job="7")
    try:
        with lock_folder(folder):
            assert json.loads((folder / ".lbr-lock").read_text())["restart"] == 1
    finally:
        if process:
            end(process)


def test_two_steps_of_one_job_are_two(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "flock_reaches_all_hosts", lambda place: False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    squeue(tmp_path, monkeypatch, "7.3 train main ada 1:00 n1")
    stranger(folder, job="7", step="3")
    with pytest.raises(EnvironmentProblem, match="SLURM job 7"), lock_folder(folder):
        pytest.fail("entered")


def test_a_second_training_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    """Of the other stage too: stage 2 would read checkpoints that stage 1 removes."""
    recipe = load(tiny_recipe(tmp_path, count=40))
    being_saved = recipe.run / "stage1" / "checkpoints" / "step-000003.part" / "state.json"
    being_saved.parent.mkdir(parents=True)
    being_saved.write_bytes(b"{}")
    process = hold(recipe.run)
    told = rf"run is in use by .*process {process} on .*give another run folder with run="

    def second() -> None:
        from lbr_ds.training.loop import train

        for stage in (1, 2):
            with pytest.raises(EnvironmentProblem, match=told):
                train(recipe, stage)

    try:
        run(second)
    finally:
        end(process)
    assert being_saved.read_bytes() == b"{}"
    assert not (recipe.run / "recipe.yaml").exists()
