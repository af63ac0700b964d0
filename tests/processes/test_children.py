"""No child outlives its parent, whenever and however that one ends; signals reach the training."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lbr_ds.system import children
from tests.ranks import ROOT

pytestmark = pytest.mark.slow

LIMIT = 120  # seconds in which all must have ended; they would run for 600
CHAINS = {
    "verb verb saves": 3,
    "verb deaf": 2,
    "crew": 1 + len(os.sched_getaffinity(0)),
    "python forks": 4,
    "foreign": 2,
}


def start(folder: Path, chain: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.processes.chain", str(folder), *chain.split()]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def family(folder: Path, count: int, first: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a chain, once so many have said that they are there; the first one first."""
    deadline = time.monotonic() + 300
    while len(found := list(folder.glob("*.pid"))) < count and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.02)
    assert len(found) == count
    return sorted(map(psutil.Process, (int(path.stem) for path in found)), key=depth)


def depth(process: psutil.Process) -> int:
    return len(process.parents())


def session(leader: int) -> list[psutil.Process]:
    """All processes of the session that a first process leads."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ends(leader: int) -> bool:
    """Whether nothing of the session is left before LIMIT; kills what is."""
    deadline = time.monotonic() + LIMIT
    while left := session(leader):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("chain", "victim"),
    [
        (chain, victim)
        for chain in CHAINS
        for victim in range(chain.count(" ") + 1)
        if not (victim == chain.count(" ") > 0)
    ],
)
def test_a_killed_parent_takes_its_children_along(chain: str, victim: int, tmp_path: Path) -> None:
    first = start(tmp_path, chain)
    family(tmp_path, CHAINS[chain], first)[victim].kill()
    if victim == 0:
        first.wait()
    assert ends(first.pid)
    assert (tmp_path / "saved").exists() == chain.endswith("saves")


def test_a_parent_that_is_killed_at_any_early_instant(tmp_path: Path) -> None:
    """While its children start and do not follow it yet."""
    killed = {}
    for number in range(8):
        first = start(tmp_path / str(number), "verb verb deaf")
        time.sleep(0.12 * number)
        first.kill()
        first.wait()
        killed[number] = first.pid
    for number, leader in killed.items():
        assert ends(leader), f"killed after {0.12 * number:.2f} s"


def test_a_signal_to_the_first_reaches_the_last_and_its_code_comes_back(tmp_path: Path) -> None:
    first = start(tmp_path, "verb verb saves")
    family(tmp_path, 3, first)
    first.terminate()
    assert first.wait(timeout=240) == 85
    assert (tmp_path / "saved").read_text() == "SIGTERM"
    assert ends(first.pid)


def test_codes_of_children() -> None:
    def ended(script: str) -> children.Ended:
        return children.run([sys.executable, "-c", script])

    assert ended("raise SystemExit(7)") == (7, [])
    assert ended("import os; os.kill(os.getpid(), 9)") == (128 + signal.SIGKILL, [])
    told = "import os, signal, sys, time; signal.signal(10, lambda *_: sys.exit(0));"
    assert ended(f"{told} os.kill(os.getppid(), 10); time.sleep(60)") == (0, [signal.SIGUSR1])
    words = children.following_command(["sh", "-c", 'exit "${LBR_DS_STARTER:-3}"'])
    assert subprocess.call(words, env=children.environment()) == 3  # it has no starter
