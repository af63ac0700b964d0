"""Processes that start each other: `python -m tests.processes.chain FOLDER KIND ...`.

Each writes its process id into FOLDER and starts the next KIND, or works when it is the last.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from lbr_ds.system import children
from lbr_ds.system.process_pool import map_in_order

FOREVER = 600


def note(folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()


def wait(folder: str) -> str:
    """A job of a pool."""
    note(Path(folder))
    time.sleep(FOREVER)
    return folder


def saves(folder: Path) -> None:
    """Training that saves when it receives a signal to stop."""

    def save(number: int, frame: object) -> None:
        (folder / "saved").write_text(signal.Signals(number).name)
        sys.exit(85)

    signal.signal(signal.SIGTERM, save)
    note(folder)
    time.sleep(FOREVER)


def deaf(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(folder)
    time.sleep(FOREVER)


def jobs(folder: Path) -> Iterator[str]:
    yield from [str(folder)] * 16


def crew(folder: Path) -> None:
    """The pool of `prepare`: the first eight jobs are done here."""
    note(folder)
    in_order_of = map_in_order(pool_only, jobs(folder))
    for _ in in_order_of:
        pass


def pool_only(folder: str) -> str:
    parent = os.getppid()
    return wait(folder) if (Path(folder) / f"{parent}.pid").exists() else folder


def forks(folder: Path) -> None:
    """A program of others, run as `-m MODULE`, with a pool of forks."""
    note(folder)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(wait, [str(folder)] * 2))


def main(folder: Path, kinds: list[str]) -> None:
    kind, rest = kinds[0], [str(folder), *kinds[1:]]
    module = ["-m", "tests.processes.chain"]
    if kind == "verb":  # as demo, reproduce and the launcher start others
        children.follow_starter()
        note(folder)
        sys.exit(children.run([sys.executable, *module, *rest]).code)
    if kind == "python":  # as the converter of checkpoints is started
        note(folder)
        sys.exit(
            subprocess.call(
                children.following_command([*module, *rest]), env=children.environment()
            )
        )
    if kind == "foreign":  # as srun or pip are started
        note(folder)
        script = f"touch {folder}/$$.pid; exec sleep {FOREVER}"
        words = children.following_command(["bash", "-c", script])
        sys.exit(subprocess.call(words, env=children.environment()))
    if kind != "forks":  # those come as others' programs, which know nothing of parents
        children.follow_starter()
    {"saves": saves, "deaf": deaf, "crew": crew, "forks": forks}[kind](folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
