"""Trainings of stage 2 that signals stop where an evaluation is due, and one without signals.

`python -m tests.training.interrupted RECIPE OUT`, started by run_ranks: OUT/whole and OUT/stopped.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from lbr_ds.config import load
from lbr_ds.distributed import end, join, leave
from lbr_ds.training import held_out, loop
from lbr_ds.training.session import Session

# name: (overrides, where the signals come: before the evaluation of a step, or in it)
CASES: dict[str, tuple[list[str], list[tuple[int, str]]]] = {
    # Nothing rises after the first evaluation, so that the stage ends at step 3 of 6.
    "patience": (
        ["stage2.optim.lr=1e-30", "stage2.patience=2", "every.evaluate=1", "every.save=100"],
        [(3, "before")],
    ),
    "saves": ([], [(3, "in"), (3, "before"), (6, "before"), (6, "in")]),
}


def plant(signals: list[tuple[int, str]]) -> None:
    """Let the last rank have the first of these signals, then in the next start the second."""
    evaluate, forwards = loop.evaluate, held_out._forwards

    def receive(session: Session, where: str) -> None:
        if signals and signals[0] == (session.step, where):
            signals.pop(0)
            if session.world.rank == session.world.size - 1:
                session.preemption.signalled = signal.SIGUSR1

    def before(session: Session, *, checkpoint_due: bool) -> Any:
        receive(session, "before")
        return evaluate(session, checkpoint_due=checkpoint_due)

    def within(session: Session, *arguments: Any) -> Any:
        receive(session, "in")
        return forwards(session, *arguments)

    loop.evaluate = held_out.evaluate = before
    held_out._forwards = within


if __name__ == "__main__":
    recipe, out = sys.argv[1], Path(sys.argv[2])
    join(timeout_minutes=5)
    planned: list[tuple[int, str]] = []
    plant(planned)
    for name, (overrides, signals) in CASES.items():
        for kind, wanted in (("whole", []), ("stopped", signals)):
            planned[:] = wanted
            run = load(recipe, [f"run={out / name / kind}", "stage2.from=backbone", *overrides])
            starts = 1
            while not loop.train(run, 2):
                starts += 1
            assert (planned, starts) == ([], 1 + len(wanted))
    leave()
    end(0)
