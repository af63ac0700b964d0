"""Suite `gpu`: utilization of one GPU, and ratios that a CPU cannot show. Takes minutes.

Random weights of the right shape, in bf16. Model FLOPs utilization (MFU) is the strict count of
plan/flops.py over the device's dense bf16 peak. A row that the device or its memory cannot run
says why and does not end the others.
"""

from __future__ import annotations

import functools
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lbr_ds.batching import PackedBatch, Sequence, pack
from lbr_ds.bench.attention import by_mask, by_segments
from lbr_ds.bench.measure import ROUNDS, Row, interleaved, ratio
from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.bench.steps import reconstruct, sft, timed_step
from lbr_ds.bench.workload import (
    BOTTLENECK,
    config_of,
    embedder,
    ib,
    ib_flops,
    random_model,
)
from lbr_ds.cluster.device import clock
from lbr_ds.cluster.synthetic import random_ids
from lbr_ds.config import OptimConfig
from lbr_ds.distributed import join
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder, build_embedder
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.objectives.info_nce import info_nce
from lbr_ds.plan.flops import bottleneck_pairs, causal_pairs, flops, sizes_of
from lbr_ds.plan.gpus import gpu_of_device
from lbr_ds.training.deepspeed.engine import Engine, load_layout

log = logging.getLogger(__name__)

LENGTH = 2048  # tokens of X and of Y in stage 1
TEXT = 512  # tokens of a text in stage 2
STEP_TOKENS = 16384
SMALL, LARGE = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"
GIB = 2**30


class Wanted(NamedTuple):
    """The name and the targets of a row."""

    measure: str
    floor: float
    goal: float
    better: Literal["lower", "higher"]
    unit: str = "ratio"

    def ratio(self, times: list[tuple[float, float]], *, theory: float, about: str) -> Row:
        """Return the row of pairs of times."""
        return ratio(
            self.measure,
            times,
            goal=self.goal,
            better=self.better,
            floor=self.floor,
            theory=theory,
            about=about,
        )


def suite(rounds: int = ROUNDS) -> list[Row]:
    """Measure all rows. Raises EnvironmentProblem without a CUDA device."""
    if not torch.cuda.is_available():
        raise EnvironmentProblem("bench gpu needs a CUDA device, and torch sees none")
    torch.manual_seed(0)
    rows = []
    for name in (SMALL, LARGE):
        rows += engine_rows(name, rounds)
    rows += step_rows(rounds)
    rows.append(
        guarded(
            Wanted("attention_dense_over_ib_16k", 6.0, 10.0, "higher"),
            lambda wanted: attention_row(wanted, rounds),
        )
    )
    wanted = Wanted("infonce_batch_1gib", 65_536, 262_144, "higher", "queries")
    rows.append(guarded(wanted, infonce_row))
    return rows


def guarded(wanted: Wanted, measure: Callable[[Wanted], Row]) -> Row:
    """Return the row, or one without a value that says what failed."""
    try:
        return measure(wanted)
    except Exception as error:  # out of memory, a kernel that is missing, a driver's fault
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        log.warning("%s: not measured: %s", wanted.measure, reason)
        return Row(
            wanted.measure,
            None,
            wanted.unit,
            wanted.goal,
            wanted.better,
            wanted.floor,
            (0.0, 0.0),
            0,
            f"not measured: {reason}",
        )
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def engine_rows(name: str, rounds: int) -> list[Row]:
    """Measure MFU in both stages under ZeRO-3, and for the small shape ZeRO-3 over plain torch."""
    size = name.rsplit("-", 1)[1].lower()
    config = config_of(name)
    wanted = [Wanted(f"mfu_stage{stage}_{size}", 0.40, 0.50, "higher") for stage in (1, 2)]
    over_torch = Wanted("zero3_over_torch", 1.08, 1.03, "lower")
    try:
        with zero3(config) as engine:
            rows = [
                guarded(wanted[0], lambda w: mfu_row(w, engine, config, stage1_step, rounds)),
                guarded(wanted[1], lambda w: mfu_row(w, engine, config, stage2_step, rounds)),
            ]
            if name == SMALL:
                rows.append(guarded(over_torch, lambda w: zero3_row(w, engine, config, rounds)))
    except Exception as error:
        failure = error
        every = wanted + ([over_torch] if name == SMALL else [])
        rows = [guarded(w, lambda w: _raise(failure)) for w in every]
    return rows


def _raise(error: Exception) -> Row:
    raise error


@contextmanager
def zero3(config: dict[str, Any]) -> Iterator[Engine]:
    """Build a ZeRO-3 engine of one rank on random bf16 weights of that shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(config, "cuda", torch.bfloat16).save_pretrained(folder)
        Card(BOTTLENECK, 4096, "last", "causal").save(folder)
        make = functools.partial(
            build_embedder, folder, activation_checkpointing=False, trust_remote_code=False
        )
        engine = Engine(
            make, folder, layout=load_layout("zero3"), optim=OptimConfig(lr=1e-6), world=join(10)
        )
        try:
            yield engine
        finally:
            engine.engine.destroy()


def stage1_step(config: dict[str, Any]) -> tuple[PackedBatch, Callable[[Tensor], Tensor], int]:
    """Return (batch, loss of the forward's result, FLOPs) of a step of stage 1."""
    vocab = config["vocab_size"]
    sequences = [ib(LENGTH, LENGTH, vocab) for _ in range(STEP_TOKENS // LENGTH // 2)]
    count = LENGTH * len(sequences)
    work = ib_flops(config, LENGTH, LENGTH) * len(sequences)
    return pack(sequences), lambda total: total / count, work


def stage2_step(config: dict[str, Any]) -> tuple[PackedBatch, Callable[[Tensor], Tensor], int]:
    """Return the same for queries and passages of TEXT tokens with in-batch negatives."""
    vocab, count = config["vocab_size"], STEP_TOKENS // TEXT
    sequences = [Sequence(random_ids(TEXT, vocab), BOTTLENECK) for _ in range(count)]

    def loss(vectors: Tensor) -> Tensor:
        scores = vectors[: count // 2] @ vectors[count // 2 :].T / 0.05
        return cross_entropy(scores, torch.arange(count // 2, device=scores.device))

    tokens = count * TEXT
    return (
        pack(sequences),
        loss,
        flops(sizes_of(config), tokens=tokens, pairs=count * causal_pairs(TEXT)),
    )


def engine_step(
    engine: Engine, batch: PackedBatch, loss: Callable[[Tensor], Tensor]
) -> Callable[[], float]:
    """Return a function that times a whole step of the engine."""

    def run() -> float:
        begin = clock()
        engine.backward(loss(engine.forward(batch)), last=True)
        engine.step(1e-6)
        return clock() - begin

    return run


def mfu_row(
    wanted: Wanted, engine: Engine, config: dict[str, Any], make: Callable[..., Any], rounds: int
) -> Row:
    """Measure MFU: the strict count at the device's peak over the seconds of a step."""
    batch, loss, work = make(config)
    step = engine_step(engine, batch.to(engine.world.device), loss)
    ideal = work / peak_flops(torch.cuda.get_device_name())
    for _ in range(2):
        step()
    times = [(ideal, step()) for _ in range(rounds)]
    seconds = sorted(s for _, s in times)[len(times) // 2]
    return wanted.ratio(
        times,
        theory=1.0,
        about=f"model FLOPs utilization, strict causal count, {batch.num_tokens} tokens a step, "
        f"ZeRO-3 on one rank, bf16, {batch.num_tokens / seconds:.0f} tokens/s",
    )


def peak_flops(device: str) -> float:
    """Return the dense bf16 peak of a device in FLOPs per second; LookupError without one."""
    if (gpu := gpu_of_device(device)) is None:
        raise LookupError(f"the bf16 peak of {device!r} is not in lbr_ds/plan/gpus.yaml")
    return gpu.tflops * 1e12


def zero3_row(wanted: Wanted, engine: Engine, config: dict[str, Any], rounds: int) -> Row:
    """Measure the engine's step over plain torch with the same fp32 master weights and AdamW."""
    batch, loss, _ = stage1_step(config)
    batch = batch.to(engine.world.device)
    model = embedder(random_model(config, "cuda", torch.bfloat16))
    times = interleaved(engine_step(engine, batch, loss), master_step(model, batch, loss), rounds)
    return wanted.ratio(
        times,
        theory=1.0,
        about="training step of stage 1 under ZeRO-3 on one rank over "
        f"plain torch, bf16 with fp32 masters, {batch.num_tokens} tokens",
    )


def master_step(
    model: Embedder, batch: PackedBatch, loss: Callable[[Tensor], Tensor]
) -> Callable[[], float]:
    """Return a function that times plain torch: bf16 weights, fp32 copies that AdamW updates."""
    weights = list(model.parameters())
    masters = [w.detach().float() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=True)

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


def step_rows(rounds: int) -> list[Row]:
    """Measure IB over plain SFT, and reconstruction over language modelling, at LENGTH."""
    config = config_of(SMALL)
    wanted = [
        Wanted(f"ib_sft_over_sft_{LENGTH}", 1.00, 0.97, "lower"),
        Wanted(f"reconstruct_over_pt_{LENGTH}", 2.0, 1.9, "lower"),
    ]

    def measure(w: Wanted) -> Row:
        model = embedder(random_model(config, "cuda", torch.bfloat16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        row = sft if w is wanted[0] else reconstruct
        step = functools.partial(timed_step, optimizer)
        return row(model, step, config, LENGTH, 4, rounds, goal=w.goal, floor=w.floor)

    return [guarded(w, measure) for w in wanted]


def attention_row(wanted: Wanted, rounds: int) -> Row:
    """Measure attention at 16k tokens: a dense mask over segments."""
    config = config_of(LARGE)
    n = (STEP_TOKENS - BOTTLENECK) // 2
    sequence = ib(n, n, 2)
    ours = by_segments([sequence], config, "cuda", torch.bfloat16)
    times = interleaved(by_mask(sequence, config, "cuda", torch.bfloat16), ours, rounds)
    return wanted.ratio(
        times,
        theory=len(sequence) ** 2 / bottleneck_pairs(n, BOTTLENECK, n),
        about=f"attention alone with all gradients, [X={n}; B=4; Y={n}], {LARGE} heads, bf16: SDPA "
        "with a dense mask over segments; theory: query-key pairs",
    )


def infonce_row(wanted: Wanted) -> Row:
    """Measure the largest power of two of queries whose loss and gradients fit into 1 GiB."""
    width, fits = config_of(SMALL)["hidden_size"], 0
    count = 4096
    while count <= wanted.goal and infonce_bytes(count, width) <= GIB:
        fits, count = count, count * 2
    return Row(
        wanted.measure,
        float(fits),
        wanted.unit,
        wanted.goal,
        "higher",
        wanted.floor,
        (float(fits), float(fits)),
        1,
        "queries, each with one candidate, whose InfoNCE "
        f"and gradients take at most 1 GiB beyond the vectors, {width} wide",
    )


def infonce_bytes(count: int, width: int, device: str = "cuda") -> int:
    """Return the peak memory of the loss and its gradients beyond its inputs."""
    drawn = torch.randn(2, count, width, device=device)
    queries, candidates = (x.clone().requires_grad_() for x in drawn / width**0.5)
    del drawn
    numbers = torch.arange(count, device=device)
    mask = FalseNegatives(numbers, numbers[:, None] + count, numbers, numbers + count, numbers >= 0)

    def run() -> None:
        loss, _ = info_nce(queries, candidates, temperature=0.05, mask=mask)
        loss.backward()

    return peak_bytes(run, device)
