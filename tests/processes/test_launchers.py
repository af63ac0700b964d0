"""How many ranks are started, by whom they are found, and where they listen."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_ds.cli import run
from lbr_ds.errors import ConfigError, EnvironmentProblem, LbrError
from lbr_ds.training.launch import check_nproc
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_recipe

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_NNODES": "2"}


def step(tasks: int, number: str = "0", process: str = "77", **more: str) -> dict[str, str]:
    """What srun sets for a task of a step, beside what the job has (seen on SLURM 24)."""
    own = {
        "SLURM_STEP_ID": number,
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_TASK_PID": process,
    }
    return {**JOB, **own, **more}


PTY = {"SLURM_PTY_PORT": "4242"}  # srun hands it on to the steps that are started in such a shell
# (environment, ranks in a process with a terminal, ranks in one without)
SHELLS = [
    ({}, 0, 0),
    (JOB, 0, 0),  # salloc without an interactive step; a batch script
    (step(1, "4294967290", **PTY), 0, 0),  # salloc with use_interactive_step
    ({**step(1, "4294967290", **PTY), "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, 0, 0),
    (step(1, **PTY), 0, 0),  # srun -n1 --pty bash
    (step(2, **PTY), 0, 2),  # srun -n2 --pty bash: typed there | a wrapped task of a nested srun
    (step(2, process="PID", **PTY), 2, 2),  # srun -n2 --pty lbr-ds; srun lbr-ds in such a shell
    (step(2, process="PID"), 2, 2),  # srun -n2 lbr-ds
    (step(2), 0, 2),  # srun -n2 bash -c 'lbr-ds ...'
    (step(1), 0, 0),  # srun -n1 in a job of two tasks
    ({**step(8), "SLURM_NTASKS": "16"}, 0, 8),  # the step's number counts
    ({**JOB, "SLURM_STEP_ID": "0"}, 0, 0),
    ({**step(1), "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 4, 4),  # torchrun in a shell
    ({"RANK": "0", "WORLD_SIZE": "x"}, 1, 1),  # refused by `join`
]


def test_a_launcher_is_what_has_started_this_very_program() -> None:
    bare = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "MASTER_")) and name not in ("RANK", "WORLD_SIZE")
    }
    command = [
        sys.executable,
        "-m",
        "tests.processes.launched",
        json.dumps([environment for environment, _, _ in SHELLS]),
    ]
    without = subprocess.run(
        command, env=bare, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, check=True
    )
    assert json.loads(without.stdout) == [ranks for _, _, ranks in SHELLS]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execve(command[0], command, bare)
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:  # how a terminal says that nobody writes to it any more
        pass
    os.waitpid(child, 0)
    assert json.loads(said) == [ranks for _, ranks, _ in SHELLS]


def test_verbs_typed_in_a_shell_of_slurm_want_no_meeting_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = step(1, "4294967290", MASTER_ADDR="192.0.2.1", MASTER_PORT="9", **PTY)
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    assert run(["mine", "demo", f"data.folder={tmp_path / 'none'}"]) == 3
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nproc", "samples", "kind", "line"),
    [
        (100_000, [], EnvironmentProblem, r"^100000 ranks cannot run .* core\(s\).*use at most \d"),
        (10**30, [32], EnvironmentProblem, r"use at most \d"),
        (3, [9, 8], ConfigError, r"samples_per_step=8 is not a multiple of world=3 ranks"),
        (2, [8, 6], None, ""),
        (1, [7], None, ""),
    ],
)
def test_the_number_of_ranks_has_a_bound(
    nproc: int, samples: list[int], kind: type[LbrError] | None, line: str
) -> None:
    if kind is None:
        check_nproc(nproc, samples)
        return
    with pytest.raises(kind, match=line):
        check_nproc(nproc, samples)


@pytest.mark.parametrize("verb", ["demo", "reproduce", "bench", "mine"])
def test_every_verb_refuses_too_many_ranks_before_it_does_anything(
    verb: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tiny_recipe(tmp_path_factory.mktemp("prepared"))
    before = sorted(recipe.parent.rglob("*"))
    words = {
        "demo": ["demo", "--out", str(tmp_path / "out"), "--nproc"],
        "reproduce": ["reproduce", "table3", "demo", f"run={tmp_path / 'out'}", "--nproc"],
        "bench": ["bench", "cluster", "demo", "--out", str(tmp_path / "out"), "--ranks"],
        "mine": ["mine", str(recipe), "--nproc"],
    }[verb]
    assert run([*words, "100000"]) == 6
    said = capsys.readouterr().err
    assert said.startswith("lbr-ds: error: 100000 ranks cannot run on this machine: ")
    assert len(said.splitlines()) == 1
    assert not any(tmp_path.iterdir())
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize("launcher", ["ours", "another"])
def test_ranks_of_one_machine_listen_on_the_loopback_interface_alone(
    launcher: str, tmp_path: Path
) -> None:
    if launcher == "ours":
        command = [sys.executable, "-m", "tests.processes.listening", "launch", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True)
    else:  # as torchrun or srun start them: rank 0 hosts the store
        run_ranks("tests.processes.listening", 2, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["sum"] for rank in found] == [[2.0], [2.0]]
    listening = [ip for rank in found for ip in rank["listening"]]
    assert len(listening) >= 2  # the store and gloo's own
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
