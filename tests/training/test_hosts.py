"""Ranks on hosts of their own: they meet, gather, save and stop as on one; a lost host is named."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lbr_ds.config import RunConfig
from lbr_ds.errors import SAVED_AND_STOPPED, LostRank
from lbr_ds.runs import checkpoints, step_of
from tests.training.hosts import Hosts, hosts
from tests.training.test_resume import metrics, weights

pytestmark = pytest.mark.slow

FAULTY = "tests.training.faulty"
SLOW = ("slow+cut", "1", "0")  # a step takes a second, so that something can happen in it


def ended(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """All ranks' exit codes and what each said."""
    try:
        said = [process.communicate(timeout=600)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], said


def at_step(folder: Path, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    """Return when the run's metrics have reached that step."""
    file = folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (file.exists() and f'"step": {step},' in file.read_text()):
        assert time.monotonic() < deadline, f"no step {step}"
        assert all(process.poll() is None for process in ranks), ended(ranks)
        time.sleep(0.01)


def disturbed(
    net: Hosts,
    recipe: Path,
    stage: int,
    step: int,
    act: Callable[[list[subprocess.Popen[str]]], None],
) -> tuple[list[int], list[str]]:
    """Train slowly, and act when a step is done."""
    ranks = net.start(FAULTY, *SLOW, "train", str(recipe), "--stage", str(stage))
    at_step(recipe.parent / "run" / f"stage{stage}", step, ranks)
    act(ranks)
    return ended(ranks)


def test_two_hosts_one_of_them_lost_on_the_way(trained: RunConfig, copied: Path) -> None:
    run = copied.parent / "run"
    for name in ("stage1", "stage2"):
        shutil.rmtree(run / name)
    with hosts(2) as net:
        codes, said = disturbed(
            net, copied, 1, 1, lambda ranks: ranks[1].send_signal(signal.SIGUSR1)
        )
        assert codes == [SAVED_AND_STOPPED, SAVED_AND_STOPPED], said
        stopped = step_of(checkpoints(run / "stage1")[-1])
        assert stopped < 4

        codes, said = disturbed(net, copied, 1, stopped + 1, lambda ranks: net.cut_off(2))
        assert codes == [LostRank.exit_code] * 2, said
        assert re.search(r"error: rank 1 is gone: on h2, last seen in step \d", said[0]), said
        assert re.search(r"error: rank 0 is gone: on h1, last seen in step \d", said[1]), said

        net.reconnect(2)
        for stage in ("1", "2"):
            codes, said = ended(net.start("lbr_ds", "train", str(copied), "--stage", stage))
            assert codes == [0, 0], said
    for name in ("stage1", "stage2"):
        assert weights(run / name) == weights(trained.run / name)
        assert metrics(run / name) == metrics(trained.run / name)
