"""`lbr-ds` as one rank of several, with a fault planted into one of them.

`python -m tests.train.faulty FAULT RANK STEP train RECIPE ...`: from step STEP on (counted from 0)
rank RANK is killed, stopped, hangs, is slow, raises, or loses its gradient, when it is to learn.
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


def plant(fault: str, rank: int, first: int) -> None:
    """Put the fault in front of stage 1's learning."""
    sound = stages.STAGES[1].learn

    def learn(engine: Any, work: Any, run: Any, world: Any) -> Any:
        if world.rank != rank or work.step < first:
            return sound(engine, work, run, world)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "hang":
            time.sleep(3600)
        if fault == "slow":
            time.sleep(0.3)
        if fault == "raise":
            raise DataError("a planted fault")
        if fault == "nan" and work.step == first:
            backward = engine.backward
            engine.backward = lambda loss, *, last: backward(loss * math.nan, last=last)
            try:
                return sound(engine, work, run, world)
            finally:
                engine.backward = backward
        return sound(engine, work, run, world)

    stages.STAGES[1] = dataclasses.replace(stages.STAGES[1], learn=learn)


if __name__ == "__main__":
    fault, rank, first, *sys.argv[1:] = sys.argv[1:]
    plant(fault, int(rank), int(first))
    watch._SILENT = 4.0
    if fault == "hang":
        # A start takes longer than a test can wait for a hang.
        mark = watch.Watch.mark
        watch.Watch.mark = lambda self, step, doing: (  # type: ignore[method-assign]
            setattr(self, "limit", 6.0) if step > int(first) else None,
            mark(self, step, doing),
        )[1]
    cli.main()
