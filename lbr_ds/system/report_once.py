"""An error that all ranks of a machine end with is printed once.

Ranks that have not joined yet, as with a recipe that cannot be read, all find the same error. The
first rank of a machine prints it; the others look for the first one at a socket whose name is made
of the line and of what started them. A rank that finds none there has an error of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable

_PATIENCE_SECONDS = 5.0  # that ranks of one machine may need to come to the same error
_POLL_SECONDS = 0.05


def report_once(line: str, report: Callable[[], None]) -> None:
    """Call `report` unless the first rank of this machine does so for the same line.

    Called without a launcher, or where there are no such sockets, it always reports.
    """
    env = os.environ
    rank = env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    count = env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", env.get("SLURM_STEP_NUM_TASKS", "")))
    if not (count.isdigit() and rank.isdigit() and int(count) > 1):
        report()
        return
    launch = os.getuid(), os.getppid(), env.get("MASTER_PORT"), env.get("SLURM_STEP_ID"), line
    place = f"\0lbr-ds-{hashlib.sha256(repr(launch).encode()).hexdigest()[:32]}"
    if int(rank) == 0:
        report()
        with contextlib.suppress(OSError):
            _wait_for_others(place, int(count) - 1)
    elif not _meets_first(place):
        report()


def _wait_for_others(place: str, others: int) -> None:
    """Let the other ranks of this machine know that the line is printed."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen(others)
        while others and (left := deadline - time.monotonic()) > 0:
            listening.settimeout(left)
            listening.accept()[0].close()
            others -= 1


def _meets_first(place: str) -> bool:
    """Whether the first rank of this machine has printed the line."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with (
            socket.socket(socket.AF_UNIX) as connecting,
            contextlib.suppress(ConnectionError, BlockingIOError),
        ):
            connecting.connect(place)
            return True
        time.sleep(_POLL_SECONDS)
    return False
