"""Held-out figures of a checkpoint, by the engine on real ZeRO-3 ranks; rank 0 writes them.

`python -m tests.training.examine RECIPE OUT`: OUT/CASE-WORLD.json.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from lbr_ds.config import load
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.training.checkpoint.random_states import random_states
from lbr_ds.training.checkpoint.resume import find_checkpoint
from lbr_ds.training.held_out import measure, read_held_out_sample
from lbr_ds.training.session import build_engine, build_session

# name: (stage, overrides)
CASES: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "one-cut": (1, ["stage1.micro_batch_tokens=60"]),
    "one-few": (1, ["evaluation.max_queries=2", "evaluation.max_passages=5"]),
    "one-mixed": (1, ["stage1.objective={ib_sft: 1, plain_sft: 1}"]),
    "two": (2, []),
}


def examine(name: str, recipe: str, out: Path, world: World) -> None:
    """Judge twice: the second time a signal comes in between."""
    stage, overrides = CASES[name]
    run = load(recipe, overrides)
    found = find_checkpoint(run, stage, world, force=True)
    session = build_session(run, stage, build_engine(run, stage, world, origin=found), start=6)
    module = session.engine.engine.module
    module.head.eval()  # the mode that is found comes back, whatever it is
    before = [part.training for part in module.modules()], str(random_states())
    sample = read_held_out_sample(run, world)
    assert sample is not None
    figures = measure(session, sample)
    assert bool(figures) is world.first
    if world.first:
        (out / f"{name}-{world.size}.json").write_text(json.dumps(figures))
    if world.rank == world.size - 1:
        session.preemption.signalled = signal.SIGUSR1
    session.step = 7
    assert measure(session, sample) is None
    assert session.watch.step == 6  # it ended before the next forward
    assert ([part.training for part in module.modules()], str(random_states())) == before
    assert not any(p.grad is not None for p in module.parameters())


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    for case in CASES:
        examine(case, sys.argv[1], Path(sys.argv[2]), place)
    leave()
    end(0)
