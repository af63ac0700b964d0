"""Train stage 1 from a run folder's newest checkpoint up to a step; several runs in one process.

`python -m tests.training.takes STOP RECIPE[,OVERRIDE...]...`, started by run_ranks.
"""

from __future__ import annotations

import sys

from lbr_ds.config import load
from lbr_ds.distributed import end, leave
from lbr_ds.training.loop import take_step
from lbr_ds.training.optim import learning_rate
from lbr_ds.training.setup import open_session


def take(recipe: str, stop: int) -> None:
    """Up to step `stop`; the last step is always saved."""
    path, *overrides = recipe.split(",")
    run = load(path, overrides)
    with open_session(run, 1) as session:
        while session.step < stop:
            lr = learning_rate(session.step, session.num_steps, run.stage1.optim)
            take_step(session, lr)
            session.saver.poll()
            if session.step % run.every.save == 0 or session.step == stop:
                session.saver.save(session.step, session.guard.state_dict())


if __name__ == "__main__":
    for one in sys.argv[2:]:
        take(one, int(sys.argv[1]))
    leave()
    end(0)
