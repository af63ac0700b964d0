"""`lbr-ds` as one rank of several, with a fault planted into one of them.

`python -m tests.training.faulty FAULT+FAULT RANK STEP train RECIPE ...`: at step
STEP (counted from 0) rank RANK is killed, stopped, hangs, is slow, raises, or loses its gradient.
hang and suspend: 6 s without progress end the run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import time
from typing import Any

from lbr_ds import cli
from lbr_ds.errors import DataError
from lbr_ds.training import stages, watch


def spoiled(sound: Any, session: Any, work: Any) -> Any:
    """Forward and backward, with a gradient that is not a number."""
    engine = session.engine
    backward = engine.backward
    engine.backward = lambda loss, *, last: backward(loss * math.nan, last=last)
    try:
        return sound(session, work)
    finally:
        engine.backward = backward


def plant(faults: list[str], rank: int, first: int) -> None:
    """Put the faults in front of stage 1's learning."""
    sound = stages.STAGES[1].forward_backward

    def forward_backward(session: Any, work: Any) -> Any:
        world = session.world
        if work.step == first:
            # Not before: a start may take longer than a test can wait for a hang.
            short = "hang" in faults or "suspend" in faults
            session.watch.limit = 6.0 if short else session.watch.limit
            watch._SILENT_SECONDS = 4.0
        if world.rank == rank and work.step >= first and "slow" in faults:
            time.sleep(1.0)
        if world.rank != rank or work.step != first:
            return sound(session, work)
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
            if name in faults:
                os.kill(os.getpid(), number)
        if "hang" in faults:
            time.sleep(3600)
        if "raise" in faults:
            raise DataError("a planted fault")
        return spoiled(sound, session, work) if "nan" in faults else sound(session, work)

    planted = dataclasses.replace(stages.STAGES[1], forward_backward=forward_backward)
    stages.STAGES[1] = planted


if __name__ == "__main__":
    faults, rank, first, *sys.argv[1:] = sys.argv[1:]
    plant(faults.split("+"), int(rank), int(first))
    cli.main()
