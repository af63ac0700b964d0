"""Jobs at once: their order, their devices, their memory, and how they are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from lbr_ds.config import load
from lbr_ds.errors import ConfigError, EnvironmentProblem, LbrError
from lbr_ds.plan.fit import GPU_FILL
from lbr_ds.plan.gpus import Cluster, find_gpu
from lbr_ds.reproduce import capacity, parallel, reproduce
from lbr_ds.reproduce.jobs import Job, RecipeSource, jobs_of, sorted_jobs
from lbr_ds.reproduce.parallel import Numbered, run_jobs
from lbr_ds.reproduce.tables import TABLES
from tests.tiny import tiny_recipe

AUTO = "engine.ds_config=auto"
# A job that writes down when it starts and ends; JOB_N says what job N does. One that fails waits
# until another one, which is to be stopped, is ready for that.
SCRIPT = """
import os, signal, subprocess, sys, time
number, folder = sys.argv[-1], sys.argv[1]
def note(word):
    with open(f"{folder}/events", "a") as file:
        file.write(f"{word} {number}\\n")
def save(*_):
    note("saved")
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
note("start")
what = os.environ.get("JOB_" + number, "")
if what == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note(f"child {child.pid}")
    open(f"{folder}/ready", "w").close()
    time.sleep(600)
if what == "wait":
    print("step 7/9", flush=True)
    open(f"{folder}/ready", "w").close()
    time.sleep(600)
if what == "fail":
    while not os.path.exists(f"{folder}/ready"):
        time.sleep(0.05)
    print("lbr-ds: error: the data is wrong", file=sys.stderr)
    sys.exit(3)
time.sleep(0.2)
note("end")
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with prepared data; nothing is trained in this file."""
    return tiny_recipe(tmp_path_factory.mktemp("parallel"), count=120)


def table_3(recipe: Path, *more: str) -> list[Job]:
    """The jobs of table 3: three backbones, three of stage 1, five of stage 2."""
    source = RecipeSource(str(recipe), more, recipe.parent / "root")
    table = TABLES["table3"](load(recipe, list(more)))
    return sorted_jobs([jobs_of(variant, 0, source) for variant in table.variants])


def run(
    recipe: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    at_once: int = 2,
    does: Mapping[int, str] | None = None,
) -> None:
    for number, what in (does or {}).items():
        monkeypatch.setenv(f"JOB_{number}", what)
    numbered = [Numbered(number, job) for number, job in enumerate(table_3(recipe))]
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    run_jobs(numbered, command, at_once=at_once, environments=[{}] * at_once, logs=folder / "logs")


def events(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "events").read_text().splitlines()]


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_a_job_starts_when_what_it_needs_is_done(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    run(recipe, tmp_path, monkeypatch, at_once=at_once)
    jobs = table_3(recipe)
    numbers = {job.folder: number for number, job in enumerate(jobs)}
    open_jobs: set[int] = set()
    done: set[int] = set()
    most = 0
    for word, text in events(tmp_path):
        number = int(text)
        if word == "start":
            assert {numbers[target.parent] for _, target in jobs[number].links} <= done
            open_jobs.add(number)
        else:
            open_jobs.remove(number)
            done.add(number)
        most = max(most, len(open_jobs))
    assert done == set(range(11))
    assert most <= at_once
    assert len(list((tmp_path / "logs").glob("*.log"))) == 11


def test_the_first_failure_stops_the_rest(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = table_3(recipe)[1].folder.name
    with pytest.raises(LbrError, match=f"job 1 .{name}. failed") as caught:
        run(recipe, tmp_path, monkeypatch, does={0: "wait", 1: "fail"})
    assert "the data is wrong (exit code 3; its output is in" in str(caught.value)
    assert str(tmp_path / "logs" / f"{name}.log") in str(caught.value)
    assert caught.value.exit_code == 3
    assert sorted(events(tmp_path)) == [["saved", "0"], ["start", "0"], ["start", "1"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_jobs_which_save(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def when_both_run() -> None:
        while not (tmp_path / "events").is_file() or len(events(tmp_path)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=when_both_run, daemon=True).start()
    with pytest.raises(LbrError, match=rf"stopped by {number.name} at job 0 .*, job 1 ") as caught:
        run(recipe, tmp_path, monkeypatch, does={0: "wait", 1: "wait"})
    assert caught.value.exit_code == 85
    assert sorted(events(tmp_path))[:2] == [["saved", "0"], ["saved", "1"]]


def test_a_job_that_does_not_stop_is_killed_with_its_children(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "GRACE_SECONDS", 0.3)
    with pytest.raises(LbrError, match=r"job 1 .* failed"):
        run(recipe, tmp_path, monkeypatch, does={0: "hang", 1: "fail"})
    (child,) = (int(words[1]) for words in events(tmp_path) if words[0] == "child")
    deadline = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_state_of_a_job_is_the_progress_in_its_output(tmp_path: Path, recipe: Path) -> None:
    output, process = tmp_path / "x.log", Any
    one = Numbered(4, table_3(recipe)[4])
    job = parallel.Running(one, 0, process, output)  # type: ignore[arg-type]
    output.write_text("loading\n")
    assert job.state() == f"{one.name} starts"
    output.write_text("step 1/9  loss 3\nstep 2/9  loss 2\nscoring\n")
    assert job.state() == f"{one.name} step 2/9"
    output.write_text("step 9/9  loss 1\nencode: 659 of 1,198 (55 %), 4.1/s, 0:02:11 left\n")
    assert job.state() == f"{one.name} encode: 659 of 1,198 (55 %)"


def test_cores_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def made(gpus: int, at_once: int, nproc: int) -> list[tuple[str | None, str]]:
        monkeypatch.setattr(capacity, "num_gpus", lambda: gpus)
        every = capacity.environments(at_once, nproc)
        return [(env.get("CUDA_VISIBLE_DEVICES"), env["OMP_NUM_THREADS"]) for env in every]

    assert made(0, 3, 1) == [(None, "5")] * 3
    assert made(1, 2, 1) == [("0", "8")] * 2
    assert made(2, 3, 1) == [("0", "5"), ("1", "5"), ("0", "5")]
    assert made(4, 2, 2) == [("0,1", "4"), ("2,3", "4")]
    assert made(2, 2, 2) == [("0,1", "4")] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [devices for devices, _ in made(2, 2, 1)] == ["5", "7"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert made(2, 1, 1) == [("5", "1")]


def test_memory_for_so_many_jobs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = table_3(recipe, "engine.ds_config=zero2")
    cpu, h100 = (Cluster(1, 1, find_gpu(name)) for name in ("cpu", "h100"))
    largest = sorted((capacity.needs_of(j, cpu)[1] for j in jobs if j.phase), reverse=True)
    monkeypatch.setattr(capacity, "free_host_memory", lambda: sum(largest[:2]))
    assert capacity.check_memory(jobs, 2, 1) == []
    with pytest.raises(EnvironmentProblem, match=r"--jobs 3: the largest job .*; use --jobs 2$"):
        capacity.check_memory(jobs, 3, 1)
    # There are eight trainings, however many jobs are asked for.
    with pytest.raises(EnvironmentProblem, match=r"--jobs 8: .* use --jobs 2$"):
        capacity.check_memory(jobs, 9, 1)
    monkeypatch.setattr(capacity, "free_host_memory", lambda: 1 << 60)
    monkeypatch.setattr(capacity, "num_gpus", lambda: 2)
    monkeypatch.setattr(capacity, "device", lambda: h100.gpu)
    device = max(capacity.needs_of(j, h100)[0] for j in jobs if j.phase)
    monkeypatch.setattr(capacity, "free_gpu_memory", lambda: int(1.5 * device / GPU_FILL))
    assert capacity.check_memory(jobs, 2, 1) == []
    with pytest.raises(EnvironmentProblem, match=r"GiB of GPU memory, .* at once; use --jobs 2"):
        capacity.check_memory(jobs, 3, 1)


def test_keys_that_are_auto_plan_with_a_share(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = table_3(recipe, AUTO)
    monkeypatch.setattr(capacity, "free_host_memory", lambda: 64 << 30)
    assert capacity.check_memory(jobs, 2, 1) == ["engine.memory_gib=32.000"]
    assert capacity.check_memory(jobs, 2, 2) == ["engine.memory_gib=16.000"]
    folders = [job.folder.name for job in table_3(recipe, AUTO, "engine.memory_gib=16")]
    assert folders == [job.folder.name for job in jobs]
    assert capacity.check_memory(table_3(recipe, AUTO, "engine.memory_gib=9"), 2, 1) == []


def test_one_job_and_several_exclude_each_other(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="--only 1 runs one job; leave out --jobs 2"):
        reproduce("table3", str(recipe), only=1, jobs=2)
