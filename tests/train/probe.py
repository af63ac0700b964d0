"""One step of each stage on real ZeRO-3 ranks; rank 0 writes loss, gradients and new parameters.

`python -m tests.train.probe RECIPE OUT`, started by tests.ranks.run_ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from lbr_ds.config import load
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.shards import steps
from lbr_ds.train.engine import load_ds_config
from lbr_ds.train.loop import build
from lbr_ds.train.stages import STAGES

# name: (stage, ds_config, tokens of a micro-batch, activation checkpointing)
CASES = {
    "gl-whole": (1, "zero3_cpu", 4096, False),
    "gl-cut": (1, "zero3_cpu", 100, False),
    "gl-checkpointing": (1, "zero3_cpu", 100, True),
    "cl-whole": (2, "zero3_cpu", 4096, False),
    "cl-cached": (2, "zero3_cpu", 60, False),
    "cl-checkpointing": (2, "zero3_cpu", 60, True),
}
# The shipped layouts for GPUs, whose bf16 allows no such closeness; on two ranks.
HALF = {
    f"{name}-{layout}": (stage, layout, 60, False)
    for layout in ("zero1", "zero2", "zero3")
    for name, stage in (("gl", 1), ("cl", 2))
}


def probe(recipe: str, out: Path, world: World) -> None:
    """Every case, each on a fresh engine."""
    cases = {**CASES, **(HALF if world.size == 2 else {})}
    for case, (number, ds_config, tokens, checkpointing) in cases.items():
        overrides = [f"stage{number}.micro_batch_tokens={tokens}", "stage2.from=backbone",
                     f"model.activation_checkpointing={checkpointing}"]  # fmt: skip
        run = load(recipe, overrides)
        stage = STAGES[number]
        engine, encoder = build(run, stage, load_ds_config(ds_config), world)
        size = run.stage(number).samples_per_step
        stream = steps(run.data.folder, stage.split, seed=run.seed, samples_per_step=size,
                       rank=world.rank, world=world.size, stop=1)  # fmt: skip
        work = stage.collate(run, encoder, next(iter(stream)))
        stats = stage.learn(engine, work, run, world)
        parameters = engine.engine.module.backbone.named_parameters()
        grads = {name: safe_get_full_grad(p) for name, p in parameters}
        norm, applied = engine.step(1e-3)
        assert applied
        after = dict(engine.weights())
        if world.first:
            found = {"stats": stats, "grads": grads, "after": after, "norm": norm,
                     "micro_batches": len(work.micro_batches)}  # fmt: skip
            torch.save(found, out / f"{case}-{world.size}.pt")


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    probe(sys.argv[1], Path(sys.argv[2]), place)
    leave()
    end(0)
