"""Every verb on a disk that is full, and on one that is read-only: one line, code 4 or 6."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lbr_ds.cli import run
from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.prepare import prepare
from tests.test_cli import verbs
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
LINE = "lbr-ds: error: "
WHY = (
    "no space is left on the disk",
    "the file system is read-only",
    "No space left on device",
    "Read-only file system",
)


def command(*arguments: str) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of `lbr-ds ARGUMENTS`, in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run(list(arguments))
    return code, errors.getvalue().splitlines()


@contextlib.contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A small disk of its own at `place`."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    """Leave no free block."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def lock(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)


@pytest.fixture(autouse=True)
def no_log_stays_open() -> Iterator[None]:
    """A rank's log file is open until its process ends; here one process takes many turns."""
    yield
    log = logging.getLogger("lbr_ds")
    for handler in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with prepared data, on a good disk."""
    return tiny_recipe(tmp_path_factory.mktemp("disks"), count=120)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with plain passages and no queries."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("documents"), prepared=False)
    lines = [json.dumps({"text": f"passage {i} of {i * i}"}) + "\n" for i in range(60)]
    (recipe.parent / "corpus.jsonl").write_text("".join(lines))
    made = load(recipe)
    prepare(made.data, made.seed)
    return recipe


# What is typed; {disk}: the bad disk, {recipe}, {documents}: the recipes, {run}: a trained run on
# a good disk, {moved}: the same on the bad one.
VERBS = {
    "init": "init {disk}/new",
    "prepare": "prepare {recipe} data.folder={disk}/data",
    "synthesize": "synthesize {documents} data.folder={disk}/data synthesis.max_tokens=8",
    "mine": "mine {recipe} data.folder={disk}/data",
    "train": "train {recipe} --stage 1 --nproc 1 run={disk}/run",
    "export": "export {run} {disk}/model",
    "merge": "merge {run} {run}/backbone --out {disk}/merged",
    "eval": "eval {run} --data {data} --out {disk}/scores.json --max-queries 4",
    "report": "report {run} --out {disk}/report",
    "plan": "plan demo --nodes 1 --gpus 1 --json {disk}/plan.json",
    "doctor": "doctor {recipe} --nproc 1 run={disk}/run",
    "reproduce": "reproduce table3 {recipe} --json {disk}/table.json run={disk}/run",
    "demo": "demo --out {disk}/demo --nproc 1",
    "bench gpu": "bench gpu --quick --row infonce_batch_1gib --json {disk}/gpu.json",
    "bench host": "bench host --quick --json {disk}/host.json",
    "bench loader": "bench loader --json {disk}/loader.json",
    "bench cluster": "bench cluster {recipe} --ranks 1 --out {disk}/bench",
}

WRITE_NOTHING = {"push", "config"}  # to a disk of this machine


def test_no_verb_is_left_out() -> None:
    assert set(VERBS) | WRITE_NOTHING == set(verbs())


@pytest.mark.parametrize("spoil", [fill, lock], ids=["full", "read-only"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_takes_nothing(
    verb: str,
    spoil: Callable[[Path], None],
    recipe: Path,
    documents: Path,
    trained: RunConfig,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = (documents if verb == "synthesize" else recipe).parent / "data"
    with disk(tmp_path / "disk", "4m") as bad:
        if verb in ("mine", "synthesize"):
            shutil.copytree(data, bad / "data")
        spoil(bad)
        words = VERBS[verb].format(
            disk=bad,
            recipe=recipe,
            documents=documents,
            run=trained.run,
            data=trained.data.folder,
        )
        capfd.readouterr()
        code, lines = command(*words.split())
        lines += capfd.readouterr().err.splitlines()  # of processes that it started
    errors = [line for line in lines if line.startswith(LINE)]
    assert code in (4, 6), lines
    assert len(errors) == 1, lines
    assert str(tmp_path / "disk") in errors[0], errors
    assert any(words in errors[0] for words in WHY), errors
    assert not [line for line in lines if "Traceback" in line], lines


@pytest.mark.parametrize("room", ["200k", "400k", "800k", "1600k"])
def test_a_disk_that_fills_up_in_training(room: str, recipe: Path, tmp_path: Path) -> None:
    """At whatever file it happens; the checkpoints that were saved stay whole."""
    with disk(tmp_path / "disk", room) as bad:
        code, lines = command(
            "train",
            str(recipe),
            "--stage",
            "1",
            "--nproc",
            "1",
            f"run={bad}/run",
            "every.save=1",
            "every.keep=6",
            "stage1.num_steps=6",
        )
        errors = [line for line in lines if line.startswith(LINE)]
        assert code in (4, 6), lines
        assert len(errors) == 1, lines
        assert str(bad) in errors[0]
        assert "Traceback" not in "\n".join(lines)
        for state in (bad / "run").rglob("step-*/state.json"):
            listed = json.loads((state.parent / "files.json").read_text())
            assert all(
                (state.parent / name).stat().st_size == f["bytes"] for name, f in listed.items()
            )
