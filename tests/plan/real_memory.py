"""Measure on real ranks the memory that `lbr-ds plan` predicts.

    python -m tests.plan.real_memory RECIPE [KEY=VALUE ...] --ranks 2 --json FILE

Each rank builds the engine around random weights of the recipe's shape, takes two steps of two full
micro-batches in each stage, and counts the bytes of DeepSpeed's own tensors. The peak is the GPU's
(torch's count) or, on CPU ranks, the process's resident memory above what it had before the engine;
glibc is made to give large blocks back, or the process would keep every peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lbr_ds.batching import Sequence, pack
from lbr_ds.cluster.device import reset_peak_memory
from lbr_ds.cluster.synthetic import write_backbone
from lbr_ds.config import RunConfig, load
from lbr_ds.config.ds_config import Layout
from lbr_ds.distributed import end, join, launched_ranks, leave
from lbr_ds.model.embedder import build_embedder
from lbr_ds.model.lora import adapting
from lbr_ds.plan.memory import Memory, memory_of
from lbr_ds.plan.shape import Shape, shape_of
from lbr_ds.plan.work import Work, work_of
from lbr_ds.training.deepspeed.engine import Engine, load_layout
from lbr_ds.training.launch import launch

_GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "2",
}


def check(run: RunConfig, config: Path | None = None) -> dict[str, Any] | None:
    """Called on every rank: planned and measured bytes of rank 0; None on the others."""
    world = join(run.engine.timeout_minutes)
    shape = shape_of(run, config)
    folder = Path(world.share(tempfile.mkdtemp(prefix="lbr-plan-") if world.first else None))
    try:
        if world.first:
            write_backbone(shape, run, folder)
        world.barrier()
        layout = load_layout(run.engine.ds_config)
        adapt = adapting(run, folder)
        before = _resident()
        make = functools.partial(
            build_embedder,
            folder,
            trust_remote_code=False,
            activation_checkpointing=run.model.activation_checkpointing,
        )
        engine = Engine(
            make, folder, layout=layout, optim=run.stage1.optim, world=world, adapt=adapt
        )
        on_gpu = torch.cuda.is_available()
        stages = []
        for number in (1, 2):
            # One micro-batch stands for the step: vectors and scores of a whole one are left out.
            work = dataclasses.replace(
                work_of(run, number, world.size), queries=0, candidates=0, cached=False
            )
            measured, peak = _take_step(engine, layout, work, run, before)
            planned = memory_of(
                shape,
                layout,
                work,
                world=world.size,
                checkpointing=run.model.activation_checkpointing,
                gpu=on_gpu,
            )
            sizes = {**planned.states, "host": planned.host}
            parts = {part: (sizes[part], size) for part, size in measured.items()}
            parts["peak"] = (_touched(planned, shape, layout, on_gpu), peak)
            stages.append({"stage": number, "bytes": parts})
        world.barrier()
    finally:
        if world.first:
            shutil.rmtree(folder, ignore_errors=True)
    leave()
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    facts = {
        "backbone": run.model.backbone,
        "parameters": shape.total,
        "ranks": world.size,
        "ds_config": run.engine.ds_config,
        "where": where,
        "stages": stages,
    }
    return facts if world.first else None


def _take_step(
    engine: Any, layout: Layout, work: Work, run: RunConfig, before: int
) -> tuple[dict[str, int], int]:
    """(bytes of each part, peak of the whole) of a step of two full micro-batches.

    The second step is measured: the first one makes the optimizer's moments.
    """
    target = [1] * work.supervised
    context = [1] * (work.length - work.supervised)
    cut = work.copies > 0
    sequence = Sequence(context, run.bottleneck.count, target, cut=cut)
    batch = pack([sequence] * work.packed).to(engine.world.device)
    for _ in range(2):
        reset_peak_memory()
        for last in (False, True):
            engine.backward(engine.forward(batch).sum() * 1e-3, last=last)
        until_update = _until_update(engine)
        engine.step(1e-5)
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak() - before
    return _parts(engine, layout, until_update), peak


def _parts(engine: Any, layout: Layout, until_update: dict[str, int]) -> dict[str, int]:
    """Bytes of DeepSpeed's own tensors on this rank; what is offloaded as one part, `host`."""
    zero: Any = engine.optimizer
    parts, host = dict(until_update), 0
    if engine.stage == 3:
        frozen = [p.ds_tensor for p in engine.engine.module.parameters() if not p.requires_grad]
        weights = [p.data for p in zero.persistent_parameters]
        if not layout.offload_parameters:
            weights += [zero.lp_param_buffer, *frozen]
        else:
            moved = [*zero.param_groups_fp16_flat_cpu_memory, *frozen]
            host += sum(_storages(moved).values())
        masters = zero.fp32_partitioned_groups_flat
        buckets = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        parts["reduction bucket"] = sum(_storages(buckets).values())
    else:
        weights, masters = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
    moments = [t for state in zero.optimizer.state.values() for t in state.values()]
    states = [t for t in [*masters, *moments] if hasattr(t, "numel") and t.numel() > 1]
    apart = _storages(weights).keys()
    parts["parameters"] = sum(_storages(weights).values())
    parts["optimizer"] = sum(size for at, size in _storages(states).items() if at not in apart)
    if layout.offload_optimizer:
        host += parts.pop("optimizer") + parts.pop("gradients", 0)
        host += sum(_storages(m.grad for m in masters if m.grad is not None).values())
    return {**parts, "host": host} if host else parts


def _until_update(engine: Any) -> dict[str, int]:
    """Bytes of what the update makes an end of; below stage 3 gradients come and go in pieces."""
    if engine.stage < 3:
        return {}
    parts = {"gradients": int(engine.optimizer.grad_partitions_flat_buffer.nbytes)}
    second = [p.ds_secondary_tensor for p in engine.engine.module.parameters()]
    size = sum(_storages(t for t in second if t is not None).values())
    return {**parts, "second copy": size} if size else parts


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address: bytes, each storage once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _touched(planned: Memory, shape: Shape, layout: Layout, on_gpu: bool) -> int:
    """The planned peak; on a CPU with what is offloaded, less the bucket's unwritten part."""
    if on_gpu:
        return planned.peak
    bucket = planned.states["reduction bucket"]
    trainable = shape.trainable * layout.width
    return planned.peak + planned.host - bucket + min(bucket, trainable)


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _peak() -> int:
    """The most that `_resident` has been since `reset_peak_memory`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> int:
    """Start `--ranks` ranks of this command; as one of them, measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_intermixed_args()
    if not launched_ranks():
        os.environ.update(_GIVE_BACK)
        return launch(sys.argv[1:], args.ranks, module="tests.plan.real_memory")
    found = check(load(args.recipe, args.overrides), args.config)
    if found is not None:
        text = json.dumps(found, indent=1)
        print(text)
        if args.json:
            args.json.write_text(text)
    return 0


if __name__ == "__main__":
    code = main()
    end(code)
    sys.exit(code)
