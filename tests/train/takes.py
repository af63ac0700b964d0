"""Stage 1 from what a run folder holds up to a step, which is saved; several runs in one go.

`python -m tests.train.takes STOP SAVE_EVERY RECIPE[,OVERRIDE...]...`, started by run_ranks.
"""

from __future__ import annotations

import sys

from lbr_ds.config import load
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.runs import step_of
from lbr_ds.train.checkpoint import provenance
from lbr_ds.train.checkpoint.resume import find_checkpoint, load_checkpoint
from lbr_ds.train.checkpoint.saver import Saver
from lbr_ds.train.deepspeed.engine import load_layout
from lbr_ds.train.feed import open_feed
from lbr_ds.train.guard import Guard
from lbr_ds.train.loop import build, open_run_folder, take_step
from lbr_ds.train.optim import learning_rate
from lbr_ds.train.stages import STAGES
from lbr_ds.train.watch import Watch


def take(recipe: str, stop: int, world: World) -> None:
    """Up to step `stop`; the last step is always saved."""
    path, *overrides = recipe.split(",")
    run, stage = load(path, overrides), STAGES[1]
    found = find_checkpoint(run, 1, world)
    if world.first:
        open_run_folder(run)
        origin = found or run.run / "backbone"
        provenance.begin(run, 1, "gl", origin, resumed=found is not None)
    world.barrier()
    start = step_of(found) if found else 0
    engine, encoder = build(run, stage, load_layout(run.engine.ds_config), world)
    counters = load_checkpoint(found, engine, world)
    assert counters == ({"steps": start} if start else {})
    feed = open_feed(run, stage, encoder, rank=world.rank, world=world.size, start=start, stop=stop)
    guard, watch = Guard(run.guard, {}, run.run / "stage1", start, world), Watch(world, 2)
    with Saver(run, 1, engine, world) as saver:
        for step in range(start, stop):
            lr = learning_rate(step, run.stage1.steps(0), run.stage1.optim)
            take_step(engine, stage, run, feed, lr, world, guard, watch)
            saver.poll()
            if (step + 1) % run.every.save == 0 or step + 1 == stop:
                saver.save(step + 1, {"steps": step + 1})


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    for one in sys.argv[2:]:
        take(one, int(sys.argv[1]), place)
    leave()
    end(0)
