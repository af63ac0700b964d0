"""Steps with and without bad ones between, on real ZeRO ranks; rank 0 writes the parameters.

`python -m tests.training.guarded RECIPE OUT`, started by tests.ranks.run_ranks.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from lbr_ds.config import load
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.shards import Step, steps
from lbr_ds.training.deepspeed.engine import load_layout
from lbr_ds.training.session import Session, build_engine, build_session

LAYOUTS = ("zero1", "zero2", "zero3", "zero1_cpu", "zero3_cpu")
PLAIN = ("good", "good", "good")
MIXED = ("good", "nan", "inf", "refused", "good", "nan", "good")


def take(session: Session, data: Step, kind: str) -> Any:
    """One step on the same data; rank 1 alone spoils its gradient. Returns (norm, applied)."""
    stage, engine = session.stage, session.engine
    backward = engine.backward
    factor = {"nan": math.nan, "inf": math.inf}.get(kind, 1.0) if session.world.rank == 1 else 1.0
    engine.backward = lambda loss, *, last: backward(loss * factor, last=last)  # type: ignore[method-assign]
    stage.forward_backward(session, stage.collate(session.run, session.tokenizer, data))
    engine.backward = backward  # type: ignore[method-assign]
    return engine.step(1e-2, lambda norm, sums: kind != "refused")


def probe(recipe: str, out: Path, world: World) -> None:
    run = load(recipe, ["stage1.micro_batch_tokens=100"])
    stream = steps(
        run.data.folder, "gl", seed=0, samples_per_step=8, rank=world.rank, world=world.size, stop=3
    )
    data = list(stream)
    for layout in LAYOUTS:
        found = []
        for kinds in (PLAIN, MIXED):
            engine = build_engine(run, 1, world, layout=load_layout(layout))
            session = build_session(run, 1, engine)
            results, good = [], iter(data)
            for kind in kinds:
                batch = next(good) if kind == "good" else data[0]
                results.append((kind, *take(session, batch, kind)))
            found.append(
                {
                    "results": results,
                    "weights": dict(engine.weights(engine.sizes() if world.first else ())),
                }
            )
        if world.first:
            torch.save(found, out / f"{layout}.pt")


if __name__ == "__main__":
    place = join(timeout_minutes=5)
    probe(sys.argv[1], Path(sys.argv[2]), place)
    leave()
    end(0)
