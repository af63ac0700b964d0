"""Data that a training reads is not replaced on this host."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.mining.mine import mine
from lbr_ds.shards import Manifest, steps
from lbr_ds.shards.in_use import in_use
from tests.mining.toy import file_bytes, make_run

LINE = r"data is in use: a training reads its split '{}'; wait .* or write to .* data.folder="


def test_prepare_and_mine_wait_for_the_training_that_reads_what_they_replace(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, count=60, methods=["bm25"], keep=1)
    manifest, before = Manifest.load(run.data.folder), file_bytes(tmp_path / "data")
    for split in ("gl", "cl"):
        with in_use(manifest, split), pytest.raises(EnvironmentProblem, match=LINE.format(split)):
            prepare(run.data, run.seed + 1)
    with in_use(manifest, "cl"):
        assert prepare(run.data, run.seed)["reused"]
        with pytest.raises(EnvironmentProblem, match=LINE.format("cl")):
            mine(run)
    assert file_bytes(tmp_path / "data") == before
    prepare(run.data, run.seed + 1)
    assert Manifest.load(run.data.folder).fingerprint != manifest.fingerprint


def test_stage_1_reads_on_while_negatives_are_mined(tmp_path: Path) -> None:
    """`mine` replaces the folder, but gl keeps its bytes."""
    run = make_run(tmp_path, count=60, methods=["bm25"], keep=1)
    manifest = Manifest.load(run.data.folder)

    def read() -> list[object]:
        found = []
        with in_use(manifest, "gl"):
            for step in steps(
                run.data.folder, "gl", seed=0, samples_per_step=4, rank=0, world=1, stop=12
            ):
                if step.index == 0 and mined:
                    assert mine(run) is not None
                found += step.samples
        return found

    mined = False
    expected = read()
    mined = True
    assert read() == expected
    assert Manifest.load(run.data.folder).fingerprint != manifest.fingerprint


def test_a_killed_training_leaves_nothing_locked(tmp_path: Path) -> None:
    run = make_run(tmp_path, count=60)
    manifest = Manifest.load(run.data.folder)
    ready, child = tmp_path / "ready", os.fork()
    if child == 0:
        with in_use(manifest, "gl"):
            ready.touch()
            time.sleep(600)
        os._exit(1)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(EnvironmentProblem, match=LINE.format("gl")):
        prepare(run.data, run.seed + 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    prepare(run.data, run.seed + 1)


def test_a_loader_process_that_outlives_its_training_locks_nothing(tmp_path: Path) -> None:
    """A fork inherits no lock: DataLoader's processes end a little later than the rank."""
    run = make_run(tmp_path, count=60)
    manifest = Manifest.load(run.data.folder)
    with in_use(manifest, "gl"):
        if (child := os.fork()) == 0:
            time.sleep(600)
            os._exit(1)
        with pytest.raises(EnvironmentProblem, match=LINE.format("gl")):
            prepare(run.data, run.seed + 1)
    try:
        prepare(run.data, run.seed + 1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_without_data_is_not_in_use(tmp_path: Path) -> None:
    run = make_run(tmp_path, count=60)
    manifest = Manifest.load(run.data.folder)
    for shard in manifest.splits["gl"]:
        (run.data.local_folder / shard.file).unlink()
    with in_use(manifest, "gl"), in_use(manifest, "nothing"):
        prepare(run.data, run.seed + 1)
