"""Steps of stage 2 that also train a batch of stage 1, and a resumed training, on real ranks.

`python -m tests.training.replayed RECIPE OUT`: OUT/CASE-WORLD.pt with the statistics and gradients
of one step, and the runs OUT/whole-WORLD and OUT/resumed-WORLD with four steps from the backbone;
the second of them was closed after two steps and opened again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lbr_ds.config import load
from lbr_ds.distributed import World
from lbr_ds.training.deepspeed.engine import load_layout
from lbr_ds.training.feed import open_feed
from lbr_ds.training.session import build_engine, build_session, text_tokenizer
from tests.training.probe import learned, run_probes

WEIGHT, BAG = 0.3, 0.7
# name: (layout in OUT, tokens of a micro-batch)
CASES = {
    "zero1-cached": ("zero1", 60),
    "zero2-whole": ("zero2", 4096),
    "zero2-cached": ("zero2", 60),
    "zero3-whole": ("zero3", 4096),
    "zero3-cached": ("zero3", 60),
}


def probe(name: str, recipe: str, out: Path, world: World) -> None:
    """One step from the backbone, as the feed gives it."""
    layout, tokens = CASES[name]
    run = load(
        recipe,
        [
            "stage2.from=backbone",
            f"stage2.generative={WEIGHT}",
            f"stage1.bag_of_words={BAG}",
            f"stage2.micro_batch_tokens={tokens}",
        ],
    )
    engine = build_engine(run, 2, world, layout=load_layout(f"{out / layout}.json"))
    session = build_session(run, 2, engine)
    work = next(open_feed(run, session.stage, text_tokenizer(run), world, start=0, stop=1))
    assert work.replay is not None
    found = learned(session, engine, work)
    batches = [len(work.micro_batches), len(work.replay.micro_batches)]
    if world.first:
        torch.save({**found, "micro_batches": batches}, out / f"{name}-{world.size}.pt")


if __name__ == "__main__":
    run_probes(probe, CASES, "stage2.generative=0.5")
