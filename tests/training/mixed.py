"""Steps and a resumed training on data of several sources, on real ZeRO-3 ranks.

`python -m tests.training.mixed RECIPE OUT`: OUT/CASE-WORLD.pt with the statistics and gradients of
one step, and the runs OUT/whole-WORLD and OUT/resumed-WORLD with four homogeneous steps of stage 2;
the second of them was closed after two steps and opened again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lbr_ds.config import load
from lbr_ds.distributed import World
from lbr_ds.training.session import build_engine, build_session
from tests.training.probe import learned, run_probes, steps_of

# name: (stage, overrides)
CASES = {
    "gl": (1, ["stage1.micro_batch_tokens=100", "stage1.bag_of_words=0.5"]),
    "cl-whole": (2, ["stage2.micro_batch_tokens=4096"]),
    "cl-cached": (2, ["stage2.micro_batch_tokens=100", "stage2.matryoshka={8: 0.5}"]),
}


def probe(name: str, recipe: str, out: Path, world: World) -> None:
    """One step from the backbone."""
    number, overrides = CASES[name]
    run = load(recipe, ["stage2.from=backbone", *overrides])
    engine = build_engine(run, number, world)
    session = build_session(run, number, engine)
    (step,) = steps_of(run, session, world, 1)
    work = session.stage.collate(run, session.tokenizer, step)
    found = {**learned(session, engine, work), "micro_batches": len(work.micro_batches)}
    if world.first:
        torch.save(found, out / f"{name}-{world.size}.pt")


if __name__ == "__main__":
    run_probes(probe, CASES, "stage2.homogeneous=true")
