"""Vectors straight from the engine on real ZeRO-3 ranks, after a resume.

`python -m tests.training.encode RECIPE OUT`: OUT/texts.json -> OUT/vectors.npy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from lbr_ds.batching import pack
from lbr_ds.config import load
from lbr_ds.distributed import end, join, leave
from lbr_ds.runs import step_of
from lbr_ds.training.checkpoint.resume import find_checkpoint, load_checkpoint
from lbr_ds.training.session import build_engine, text_tokenizer

if __name__ == "__main__":
    run, out = load(sys.argv[1]), Path(sys.argv[2])
    world = join(timeout_minutes=2)
    engine = build_engine(run, 2, world)
    found = find_checkpoint(run, 2, world)
    assert found is not None
    assert step_of(found) == run.stage2.num_steps
    load_checkpoint(found, engine, world)
    sequences = text_tokenizer(run).embed(json.loads((out / "texts.json").read_text()))
    with torch.no_grad():
        vectors = engine.forward(pack(sequences))
    if world.first:
        np.save(out / "vectors.npy", vectors.numpy())
    leave()
    end(0)
