"""`lbr-ds` as one rank of several, with a fault planted into one of them.

`python -m tests.train.faulty FAULT+FAULT RANK STEP train RECIPE ...`: when it is to learn from step
STEP (counted from 0) rank RANK is killed, stopped, hangs, is slow, raises, or loses its gradient.
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
from lbr_ds.train import stages, watch


def plant(faults: list[str], rank: int, first: int) -> None:
    """Put the faults in front of stage 1's learning."""
    sound = stages.STAGES[1].learn

    def learn(engine: Any, work: Any, run: Any, world: Any) -> Any:
        if work.step == first:
            # Not before: a start may take longer than a test can wait for a hang.
            running.limit, watch._SILENT = (6.0 if "hang" in faults else running.limit), 4.0
        if world.rank == rank and work.step >= first and "slow" in faults:
            time.sleep(0.3)
        if world.rank != rank or work.step != first:
            return sound(engine, work, run, world)
        if "kill" in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if "stop" in faults:
            os.kill(os.getpid(), signal.SIGSTOP)
        if "hang" in faults:
            time.sleep(3600)
        if "raise" in faults:
            raise DataError("a planted fault")
        if "nan" not in faults:
            return sound(engine, work, run, world)
        backward = engine.backward
        engine.backward = lambda loss, *, last: backward(loss * math.nan, last=last)
        try:
            return sound(engine, work, run, world)
        finally:
            engine.backward = backward

    stages.STAGES[1] = dataclasses.replace(stages.STAGES[1], learn=learn)
    enter = watch.Watch.__enter__

    def noted(self: watch.Watch) -> watch.Watch:
        global running
        running = self
        return enter(self)

    watch.Watch.__enter__ = noted  # type: ignore[method-assign]


running: watch.Watch

if __name__ == "__main__":
    faults, rank, first, *sys.argv[1:] = sys.argv[1:]
    plant(faults.split("+"), int(rank), int(first))
    cli.main()
