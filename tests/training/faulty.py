"""`lbr-ds` as one rank of several, with a fault planted into one of them.

`python -m tests.training.faulty FAULT+FAULT RANK STEP train RECIPE ...`: at step
STEP (counted from 0) rank RANK is killed, stopped, hangs, is slow, raises, or loses its gradient.
hang and suspend: 6 s without progress end the run. stop, suspend and cut: so do 6 s of silence.
With --nproc, the ranks that are started have the fault.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import sys
import time
from typing import Any

from lbr_ds import cli
from lbr_ds.errors import DataError
from lbr_ds.training import launch, stages, watch

MODULE = "tests.training.faulty"


def spoiled(sound: Any, session: Any, work: Any) -> Any:
    """Forward and backward, with a gradient that is not a number."""
    engine = session.engine
    backward = engine.backward
    engine.backward = lambda loss, *, last: backward(loss * math.nan, last=last)
    try:
        return sound(session, work)
    finally:
        engine.backward = backward


def prepare(faults: list[str], session: Any) -> None:
    """Wait until every rank can name every other one, and let the watch be impatient.

    Not at the start, which may take longer than a test can wait for a hang.
    """
    while len(session.watch._seen) < session.world.size:
        time.sleep(0.01)
    session.world.barrier()
    if {"hang", "suspend"}.intersection(faults):
        session.watch.limit = 6.0
    if {"stop", "suspend", "cut"}.intersection(faults):
        watch._SILENT_SECONDS = 6.0


def act(faults: list[str]) -> None:
    """What one rank does at one step, before it learns."""
    for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        if name in faults:
            os.kill(os.getpid(), number)
    if "hang" in faults:
        time.sleep(3600)
    if "raise" in faults:
        raise DataError("a planted fault")


def plant(faults: list[str], rank: int, first: int) -> None:
    """Put the faults in front of stage 1's learning."""
    sound = stages.STAGES[1].forward_backward

    def forward_backward(session: Any, work: Any) -> Any:
        world = session.world
        if work.step == max(first, session.start):
            prepare(faults, session)
        if "suspend" in faults and work.step == session.num_steps - 1:
            session.watch.limit = 120.0  # the last save is no progress, and a disk may be busy
        if world.rank == rank and work.step >= first and "slow" in faults:
            time.sleep(1.0)
        if world.rank != rank or work.step != first:
            return sound(session, work)
        act(faults)
        return spoiled(sound, session, work) if "nan" in faults else sound(session, work)

    planted = dataclasses.replace(stages.STAGES[1], forward_backward=forward_backward)
    stages.STAGES[1] = planted


if __name__ == "__main__":
    fault, sys.argv[1:] = sys.argv[1:4], sys.argv[4:]
    if "--nproc" in sys.argv:
        start = functools.partial(launch.launch, module=MODULE)
        launch.launch = lambda arguments, nproc: start([*fault, *arguments], nproc)
    else:
        faults, rank, first = fault
        plant(faults.split("+"), int(rank), int(first))
    cli.main()
