"""One step of each stage on real ZeRO-3 ranks; rank 0 writes loss, gradients and new parameters.

`python -m tests.training.probe RECIPE OUT`, started by tests.ranks.run_ranks.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from webdataset import DataPipeline

from lbr_ds.batching import PackedBatch
from lbr_ds.config import RunConfig, load
from lbr_ds.config.ds_config import Layout
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.shards import steps
from lbr_ds.training.deepspeed.engine import Engine, load_layout
from lbr_ds.training.deepspeed.library import gathered
from lbr_ds.training.loop import take_step
from lbr_ds.training.session import Session, build_engine, build_session
from lbr_ds.training.setup import open_session
from lbr_ds.training.stages import Totals
from lbr_ds.training.work import Work

# name: (stage, ds_config, tokens of a micro-batch, further overrides)
CHECKPOINTING = ["model.activation_checkpointing=true"]
CASES = {
    "gl-whole": (1, "zero3_cpu", 4096, []),
    "gl-cut": (1, "zero3_cpu", 100, []),
    "gl-bag": (1, "zero3_cpu", 100, ["stage1.bag_of_words=0.7"]),
    "gl-checkpointing": (1, "zero3_cpu", 100, CHECKPOINTING),
    "cl-whole": (2, "zero3_cpu", 4096, []),
    "cl-cached": (2, "zero3_cpu", 100, ["stage2.chunk_tokens=60"]),
    "cl-prefixes": (2, "zero3_cpu", 100, ["stage2.matryoshka={8: 0.5, 4: 2}"]),
    "cl-checkpointing": (2, "zero3_cpu", 60, CHECKPOINTING),
    "gl-by-part": (1, "zero3_cpu", 100, []),
    "cl-by-part": (2, "zero3_cpu", 60, CHECKPOINTING),
    "cl-second-copy": (2, "zero3_cpu", 100, []),
    "gl-zero1-fp32": (1, "zero1_cpu", 100, []),
    "cl-zero1-fp32": (2, "zero1_cpu", 100, ["stage2.chunk_tokens=60"]),
}
# What differs from the ds_config: no room to gather a layer in one go; ZeRO++ over "nodes" of two.
CHANGES = {
    "gl-by-part": {"stage3_prefetch_bucket_size": 0},
    "cl-by-part": {"stage3_prefetch_bucket_size": 0},
    "cl-second-copy": {"zero_hpz_partition_size": 2},
}
# Chunks reduced one by one, as where a whole gradient does not fit.
CASES["cl-reduced-each"] = CASES["cl-cached"]
# Whole parameters in fp32, with many small reduction buckets; the layouts are in OUT.
FLAT = {
    "gl-zero1": (1, "zero1", 100, []),
    "gl-zero2": (1, "zero2", 100, []),
    "cl-zero1": (2, "zero1", 100, ["stage2.chunk_tokens=60"]),
    "cl-zero2": (2, "zero2", 100, ["stage2.chunk_tokens=60"]),
}
CASES.update(FLAT)
# Adapters; layouts that lie in OUT, every tensor cut up. Chunks drop alike in both encodings.
_ADAPTED = ["lora.rank=3", "lora.alpha=6"]
LORA = {
    "gl-lora": (1, "zero3", 100, _ADAPTED),
    "gl-lora-bag": (1, "zero2", 100, [*_ADAPTED, "stage1.bag_of_words=0.7"]),
    "cl-lora": (2, "zero3", 100, [*_ADAPTED, *CHECKPOINTING, "stage2.chunk_tokens=60"]),
    "cl-lora-dropout": (2, "zero3", 100, [*_ADAPTED, "lora.dropout=0.5"]),
}
# The shipped layouts for GPUs, whose bf16 allows no such closeness; on two ranks. For those that
# offload the optimizer DeepSpeed compiles an Adam of its own.
OFFLOADED = ("zero3_offload", "zero3_offload_params")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
HALF: dict[str, tuple[int, str, int, list[str]]] = {
    f"{name}-{layout}": (stage, layout, 60, [])
    for layout in ("zero1", "zero2", "zero3", *(OFFLOADED if COMPILER else ()))
    for name, stage in (("gl", 1), ("cl", 2))
}


def probe(recipe: str, out: Path, world: World) -> None:
    """Every case, each on a fresh engine; the step is taken twice."""
    cases = {**CASES, **LORA, **(HALF if world.size == 2 else {})}
    cases["cl-second-copy"] = cases.pop("cl-second-copy")  # its groups are for the process's life
    for case, (number, layout, tokens, more) in cases.items():
        overrides = [f"stage{number}.micro_batch_tokens={tokens}", "stage2.from=backbone", *more]
        run = load(recipe, overrides)
        chosen = load_layout(f"{out / layout}.json" if case in (*LORA, *FLAT) else layout)
        chosen.config["zero_optimization"].update(CHANGES.get(case, {}))
        chosen = Layout.of(layout, chosen.config)
        engine = build_engine(run, number, world, layout=chosen)
        session = build_session(run, number, engine)
        stage = session.stage
        work = stage.collate(run, session.tokenizer, next(iter(steps_of(run, session, world, 1))))
        if case == "cl-reduced-each":
            session.one_reduction = False
        found: dict[str, Any] = {
            "micro_batches": len(work.micro_batches),
            "leaves": sum(hasattr(m, "_z3_leaf") for m in engine.engine.module.modules()),
            "before": learning(engine) if case in LORA else {},
        }
        for turn in ("", "second_"):
            heard = Heard(engine)
            session.engine = cast("Engine", heard)
            totals = stage.forward_backward(session, work)
            found[f"{turn}heard"] = [output.detach() for output in heard.outputs]
            found[f"{turn}grads"] = dict(engine.gradients())
            norm, stats = update(engine, totals)
            found |= {f"{turn}norm": norm, f"{turn}stats": stats}
            found[f"{turn}after"] = dict(engine.weights(engine.sizes() if world.first else ()))
        found["one_reduction"] = session.__dict__.get("one_reduction")
        if world.first:
            torch.save(found, out / f"{case}-{world.size}.pt")


def learned(session: Session, engine: Engine, work: Work) -> dict[str, Any]:
    """The statistics and the gradients of a step, after its update."""
    totals = session.stage.forward_backward(session, work)
    grads = dict(engine.gradients())
    _, stats = update(engine, totals)
    return {"stats": stats, "grads": grads}


def run_probes(
    probe: Callable[[str, str, Path, World], None], cases: Iterable[str], override: str
) -> None:
    """The program of a rank, `RECIPE OUT`: a probe of each case, then the trainings."""
    place = join(timeout_minutes=2)
    given, target = sys.argv[1], Path(sys.argv[2])
    for case in cases:
        probe(case, given, target, place)
    train_whole_and_resumed(given, target, place, override)
    leave()
    end(0)


def train_whole_and_resumed(recipe: str, out: Path, world: World, override: str) -> None:
    """Four steps of stage 2 from the backbone, once whole, and once closed after two of them."""
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        place = out / f"{name}-{world.size}"
        run = load(recipe, [f"run={place}", "stage2.from=backbone", override])
        for stop in stops:
            with open_session(run, 2) as session:
                while session.step < stop:
                    metrics = take_step(session, 1e-3)
                    session.saver.poll()
                    session.meter.log(session.step, metrics)
                session.saver.save(session.step, session.guard.state_dict())


def steps_of(run: RunConfig, session: Session, world: World, stop: int) -> DataPipeline:
    """This rank's first `stop` steps of the session's stage."""
    return steps(
        run.data.folder,
        session.stage.split,
        seed=run.seed,
        samples_per_step=session.config.samples_per_step,
        rank=world.rank,
        world=world.size,
        stop=stop,
        mixing=run.mixing(session.stage.number),
    )


def update(engine: Engine, totals: Totals) -> tuple[float, dict[str, float]]:
    """Take the step; the gradient's norm and the statistics."""
    told: list[float] = []

    def accept(norm: float, sums: list[float]) -> bool:
        told.extend(sums)
        return True

    norm, applied = engine.step(1e-3, accept, totals.sums)
    assert applied
    return norm, totals.stats(told)


class Heard:
    """An engine whose forwards are noted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: list[Tensor] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        self.outputs.append(self.engine.forward(batch))
        return self.outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def learning(engine: Engine) -> dict[str, Tensor]:
    """All parameters that learn, whole."""
    found = {}
    for name, parameter in engine.engine.module.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter):
                found[name.removeprefix("backbone.")] = parameter.detach().clone()
    return found


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    # As on a CPU without fp16, where DeepSpeed once took bf16 for fp32: the harder case.
    get_accelerator().is_fp16_supported = lambda: False
    probe(sys.argv[1], Path(sys.argv[2]), place)
    leave()
    end(0)
