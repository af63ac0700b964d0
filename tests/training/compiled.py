"""Steps with eager and with compiled layers on real ranks; rank 0 writes what they gave.

`python -m tests.training.compiled RECIPE OUT CASE...`, started by tests.ranks.run_ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lbr_ds.config import load
from lbr_ds.config.ds_config import Layout
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.model import opaque_attention
from lbr_ds.shards import steps
from lbr_ds.training.deepspeed.compiling import BACKEND
from lbr_ds.training.deepspeed.engine import load_layout
from lbr_ds.training.session import build_engine, build_session
from tests.training.probe import steps_of, update

# name: (stage, ds_config, tokens of a micro-batch, further overrides)
CASES = {
    "zero1": (1, "zero1", 100, []),
    "zero2": (2, "zero2", 4096, ["model.activation_checkpointing=true"]),
    "zero3": (1, "zero3", 100, []),
    # Gradient caching, adapters and dropout: both encodings must drop the same values.
    "zero3-lora": (2, "zero3", 100, ["lora.rank=3", "lora.dropout=0.5", "stage2.chunk_tokens=60"]),
}
STEPS = 2


def take(
    recipe: str, out: Path, world: World, case: str, compile: bool
) -> list[tuple[float, dict[str, Tensor]]]:
    """Take steps and return the loss and the gradients of each."""
    number, layout, tokens, more = CASES[case]
    overrides = [f"stage{number}.micro_batch_tokens={tokens}", "stage2.from=backbone", *more]
    run = load(recipe, [*overrides, f"model.compile={compile}"])
    engine = build_engine(run, number, world, layout=load_layout(f"{out / layout}.json"))
    session = build_session(run, number, engine)
    found = []
    for samples in steps_of(run, session, world, STEPS):
        work = session.stage.collate(run, session.tokenizer, samples)
        totals = session.stage.forward_backward(session, work)
        grads = dict(engine.gradients())
        found.append((update(engine, totals)[1]["loss"], grads))
    return found


def kept(recipe: str, out: Path, world: World, compile: bool) -> int:
    """Return the bytes that a ZeRO-3 forward keeps for its backward."""
    run = load(recipe, [f"model.compile={compile}"])
    engine = build_engine(run, 1, world, layout=load_layout(f"{out}/zero3.json"))
    session = build_session(run, 1, engine)
    stream = steps(
        run.data.folder, "gl", seed=0, samples_per_step=8, rank=world.rank, world=world.size, stop=1
    )
    work = session.stage.collate(run, session.tokenizer, next(iter(stream)))
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = engine.forward(work.micro_batches[0])
    for storage in opaque_attention._storages.values():
        if isinstance(record := storage.value, opaque_attention._Record):
            saved += [*record.inputs, record.output]
    # A gathered parameter is empty again, unless something holds a view of it.
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    engine.backward(loss, last=True)
    return sum(sizes.values())


def compiled_by_part(recipe: str, out: Path, world: World) -> bool:
    """Return whether layers are compiled whose modules ZeRO-3 gathers one by one."""
    layout = load_layout(f"{out}/zero3.json")
    layout.config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    layout = Layout.of("by-part", layout.config)
    engine = build_engine(load(recipe, ["model.compile=on"]), 1, world, layout=layout)
    return "forward" in vars(engine.engine.module.backbone.base_model.layers[0])


def compare(recipe: str, out: Path, cases: list[str], world: World) -> None:
    found: dict[str, Any] = {}
    for case in cases:
        eager, compiled = (take(recipe, out, world, case, how) for how in (False, True))
        found[case] = (eager, compiled)
    found["kept"] = [kept(recipe, out, world, how) for how in (False, True)]
    found["by_part"] = compiled_by_part(recipe, out, world)
    found["graph_breaks"] = dict(counters["graph_break"])
    found["graphs"] = counters["stats"]["unique_graphs"]
    if world.first:
        torch.save(found, out / f"compiled-{world.size}.pt")


if __name__ == "__main__":
    os.environ[BACKEND] = "aot_eager"
    compare(sys.argv[1], Path(sys.argv[2]), sys.argv[3:], join(timeout_minutes=4))
    leave()
    end(0)
