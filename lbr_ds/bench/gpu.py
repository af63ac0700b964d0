"""Suite `gpu`: utilization of one GPU, and ratios that a CPU cannot show.

Random weights of the right shape, in bf16. Model FLOPs utilization (MFU) is the strict count of
plan/flops.py over the device's dense bf16 peak. The short version also runs on a CPU.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, pack
from lbr_ds.bench import models, train_command
from lbr_ds.bench.attention import by_mask, by_segments, kernel_for
from lbr_ds.bench.measure import Comparison, Row, Target
from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.bench.setting import Setting
from lbr_ds.bench.steps import reconstruct, sft, timed_step
from lbr_ds.bench.workload import BOTTLENECK, ib
from lbr_ds.cluster.benchmark.rank import random_work, work_flops
from lbr_ds.cluster.device import clock
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.model.embedder import Embedder
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.objectives.info_nce import info_nce
from lbr_ds.plan.flops import bottleneck_pairs, sizes_of
from lbr_ds.plan.gpus import gpu_of_device
from lbr_ds.training.deepspeed.engine import Engine
from lbr_ds.training.loop import take_step
from lbr_ds.training.meter import memory_gib
from lbr_ds.training.session import build_session
from lbr_ds.training.stages import STAGES

log = logging.getLogger(__name__)

SMALL, LARGE = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"
NOMINAL = 1e12  # FLOPs per second that the short version takes as a CPU's peak
LR = 1e-6
GIB = 2**30


def check(setting: Setting) -> None:
    """Raise EnvironmentProblem without a CUDA device, except for the short version."""
    if not models.ON_GPU and not setting.quick:
        raise EnvironmentProblem(
            "bench gpu needs a CUDA device, and torch sees none; --quick runs tiny sizes on a CPU"
        )


def measure(target: Target, setting: Setting) -> Row:
    """Measure one row."""
    torch.manual_seed(0)
    return MEASURES[target.measure](target, setting)


def mfu_row(target: Target, setting: Setting, *, name: str, number: int) -> Row:
    """Measure MFU: the strict count at the device's peak over the seconds of a training step.

    A step that runs out of memory in spite of the plan is repeated at the next smaller size.
    """
    steps = models.fitting_steps(name, number, setting)
    for step, last in zip(steps, [*steps[1:], None], strict=True):
        try:
            return _mfu_of_step(target, setting, name, number, step)
        except torch.OutOfMemoryError:
            if last is None:
                raise
            log.warning("%s: %s ran out of memory, so %s is tried", target.measure, step, last)
            setting.release()
    raise AssertionError("there is at least one step")


def _mfu_of_step(
    target: Target, setting: Setting, name: str, number: int, step: models.Step
) -> Row:
    key = ("trained", name, step.checkpointing)
    model = setting.shared(key, lambda: models.trained(name, step.checkpointing, setting))
    folder = model.runs[number].run
    run = models.recipe(name, number, step, folder, models.sizes(setting))
    world, stage = model.engine.world, STAGES[number]
    work = random_work(run, stage, world, model.config["vocab_size"])
    feed = (replace(work, step=n) for n in itertools.count())
    session = build_session(run, number, model.engine, feed=feed)
    ideal = work_flops(run, work, sizes_of(model.config)) / peak_flops()

    def seconds() -> float:
        begin = clock()
        take_step(session, lr=0.0)
        return clock() - begin

    if models.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    first = seconds() + seconds()
    times = [seconds() for _ in range(setting.rounds)]
    middle = sorted(times)[len(times) // 2]
    return target.row(
        [ideal / own for own in times],
        theory=1.0,
        first_seconds=first,
        about=f"model FLOPs utilization, strict causal count, {work.num_tokens} tokens a step, "
        f"{'with' if step.checkpointing else 'without'} activation checkpointing, "
        f"{models.LAYOUT} on one rank, {models.DTYPE}, {work.num_tokens / middle:.0f} tokens/s, "
        f"peak {memory_gib():.1f} GiB",
    )


def peak_flops() -> float:
    """Return the device's dense bf16 peak in FLOPs per second; LookupError for an unknown GPU."""
    if not models.ON_GPU:
        return NOMINAL
    return peak_of_device(torch.cuda.get_device_name())


def peak_of_device(device: str) -> float:
    """Return the dense bf16 peak of a device in FLOPs per second; LookupError without one."""
    if (gpu := gpu_of_device(device)) is None:
        raise LookupError(f"the bf16 peak of {device!r} is not in lbr_ds/plan/gpus.yaml")
    return gpu.tflops * 1e12


def zero3_row(target: Target, setting: Setting) -> Row:
    """Measure the engine's step over plain torch with the same fp32 master weights and AdamW."""
    step = models.Step(2 if setting.quick else 4, checkpointing=False)
    model = setting.shared(("trained", SMALL, False), lambda: models.trained(SMALL, False, setting))
    run = models.recipe(SMALL, 1, step, model.runs[1].run, models.sizes(setting))
    world = model.engine.world
    work = random_work(run, STAGES[1], world, model.config["vocab_size"])
    (batch,) = (batch.to(world.device) for batch in work.micro_batches)

    def loss(total: Tensor) -> Tensor:
        return total / work.num_targets

    with models.plain_torch(SMALL, False, setting) as peer:
        comparison = Comparison(
            engine_step(model.engine, batch, loss),
            master_step(peer, batch, loss),
            theory=1.0,
            about=f"training step of stage 1 under {models.LAYOUT} on one rank over plain torch "
            f"with fp32 masters, {models.DTYPE}, {batch.num_tokens} tokens",
        )
        return comparison.row(target, setting.rounds)


def engine_step(
    engine: Engine, batch: PackedBatch, loss: Callable[[Tensor], Tensor]
) -> Callable[[], float]:
    """Return a function that times a whole step of the engine."""

    def run() -> float:
        begin = clock()
        engine.backward(loss(engine.forward(batch)), last=True)
        engine.step(LR)
        return clock() - begin

    return run


def master_step(
    model: Embedder, batch: PackedBatch, loss: Callable[[Tensor], Tensor]
) -> Callable[[], float]:
    """Return a function that times plain torch: bf16 weights, fp32 copies that AdamW updates."""
    weights = list(model.parameters())
    masters = [w.detach().float() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=LR, fused=True)

    def run() -> float:
        begin = clock()
        loss(model(batch)).backward()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([w.detach() for w in weights], masters)
        return clock() - begin

    return run


def objective_row(target: Target, setting: Setting, *, compare: Callable[..., Comparison]) -> Row:
    """Measure IB over plain SFT, or reconstruction over language modelling, in plain torch."""
    key = ("plain torch", SMALL)
    model = setting.shared(key, lambda: models.plain_torch(SMALL, False, setting))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    step = functools.partial(timed_step, optimizer)
    shape, length = models.config(SMALL, setting), models.sizes(setting).length
    return compare(model, step, shape, length, 4).row(target, setting.rounds)


def attention_row(target: Target, setting: Setting) -> Row:
    """Measure attention at 16k tokens: a dense mask over segments."""
    setting.release()
    shape = models.config(LARGE, setting)
    n = 30 if setting.quick else (16384 - BOTTLENECK) // 2
    sequence = ib(n, n, 2)
    kernel = kernel_for(pack([sequence]), shape, models.DEVICE, models.DTYPE)
    comparison = Comparison(
        by_mask(sequence, shape, models.DEVICE, models.DTYPE),
        by_segments([sequence], shape, models.DEVICE, models.DTYPE),
        theory=len(sequence) ** 2 / bottleneck_pairs(n, BOTTLENECK, n),
        about=f"attention alone with all gradients, [X={n}; B=4; Y={n}], {LARGE} heads, "
        f"{models.DTYPE}: SDPA with a dense mask over segments ({kernel}); theory: query-key pairs",
    )
    return comparison.row(target, setting.rounds)


def infonce_row(target: Target, setting: Setting) -> Row:
    """Measure the largest power of two of queries whose loss and gradients fit into 1 GiB."""
    setting.release()
    width = models.config(SMALL, setting)["hidden_size"]
    budget, start = (GIB >> 6, 256) if setting.quick else (GIB, int(target.floor))
    fits = largest_batch(start, width, budget)
    return target.row(
        [float(fits)],
        about=f"queries, each with one candidate, whose InfoNCE and gradients take at most "
        f"{budget >> 20} MiB beyond the vectors, {width} wide",
    )


def largest_batch(start: int, width: int, budget: int) -> int:
    """Return the largest power of two of queries that fits, searched from `start`.

    The time of a batch grows with its square, so no batch is tried whose two gradients alone
    exceed the budget.
    """

    def fits(count: int) -> bool:
        gradients = 2 * count * width * 4
        return gradients <= budget and infonce_bytes(count, width, models.DEVICE) <= budget

    count = start
    while count > 1 and not fits(count):
        count //= 2
    if count == start:
        while fits(2 * count):
            count *= 2
    return count


def infonce_bytes(count: int, width: int, device: str) -> int:
    """Return the peak memory of the loss and its gradients beyond its inputs."""
    drawn = torch.randn(2, count, width, device=device)
    queries, candidates = (x.clone().requires_grad_() for x in drawn / width**0.5)
    del drawn
    numbers = torch.arange(count, device=device)
    mask = FalseNegatives(numbers, numbers[:, None] + count, numbers, numbers + count, numbers >= 0)

    def run() -> None:
        loss, _ = info_nce(queries, candidates, temperature=0.05, mask=mask)
        torch.autograd.grad(loss, (queries, candidates))

    return peak_bytes(run, device)


MEASURES: dict[str, Callable[[Target, Setting], Row]] = {
    **{
        f"mfu_stage{number}_{size}": functools.partial(mfu_row, name=name, number=number)
        for size, name in (("0.5b", SMALL), ("1.5b", LARGE))
        for number in (1, 2)
    },
    "zero3_over_torch": zero3_row,
    "ib_sft_over_sft_2048": functools.partial(objective_row, compare=sft),
    "reconstruct_over_pt_2048": functools.partial(objective_row, compare=reconstruct),
    "attention_dense_over_ib_16k": attention_row,
    "infonce_batch_1gib": infonce_row,
    "train_tokens_per_second": train_command.measure,
}
