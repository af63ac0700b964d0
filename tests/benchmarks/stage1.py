"""Suite `stage1`: whole training steps of stage 1 against plain training and a dense mask.

All on the shape of SmolLM2-135M, all 30 layers, with random weights: what a step costs depends on
the shape alone. A step is forward, backward and a fused AdamW, in fp32. Both sides of a row are the
same weights; `theory` is the ratio of the FLOPs that each side must do, optimizer aside.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lbr_ds.batching import Sequence
from lbr_ds.bench.attention import dense_ib_mask
from lbr_ds.bench.measure import ROUNDS, Comparison, Row, Target, interleaved, ratio
from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.bench.steps import Step, packed_loss, reconstruct, sft, timed_step
from lbr_ds.bench.workload import (
    SMALL,
    embedder,
    ib,
    ib_flops,
    plain,
    random_model,
)
from lbr_ds.cluster.device import clock
from lbr_ds.cluster.synthetic import random_ids
from lbr_ds.model.embedder import Embedder
from lbr_ds.objectives.generative import ib_generative_loss
from lbr_ds.plan.flops import flops, sizes_of
from tests.benchmarks.texts import TINY

log = logging.getLogger(__name__)
ROWS, WORDS = 1024, 32_000  # of the head's rows
QUICK = {"rounds": 1, "config": TINY, "lengths": (8, 12, 16), "head": (40, 300)}


def suite(
    rounds: int = ROUNDS,
    config: dict[str, Any] = SMALL,
    lengths: tuple[int, int, int] = (128, 256, 512),
    head: tuple[int, int] = (ROWS, WORDS),
) -> list[Row]:
    """All rows. lengths: the short, the middle and the long X and Y, in tokens."""
    torch.manual_seed(0)
    model = embedder(random_model(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    step = functools.partial(timed_step, optimizer)
    short, middle, long = lengths
    rows = [
        # Two and a half percent is less than a shared machine's mood: more rounds.
        logged(
            sft(model, step, config, short, 2), f"ib_sft_over_sft_{short}", 3 * rounds, 1.01, 1.03
        ),
        logged(sft(model, step, config, long, 1), f"ib_sft_over_sft_{long}", rounds, 0.97, 1.00),
        *(
            logged(reconstruct(model, step, config, n, 1), f"reconstruct_over_pt_{n}", rounds)
            for n in (middle, long)
        ),
        dense_mask(model, step, config, long, rounds),
        packed(model, step, config, long, rounds),
    ]
    del model, optimizer, step
    return rows + head_loss(*head, 128, rounds) + head_loss(*head, config["hidden_size"], rounds)


def logged(
    found: Comparison, measure: str, rounds: int, goal: float | None = None, floor: float = 2.1
) -> Row:
    """Measure and log the row of a comparison; the default goal is 1.05 times its theory."""
    goal = goal or 1.05 * (found.theory or 1.0)
    row = found.row(Target(measure, floor, goal, "lower", found.about), rounds)
    log.info("%s: %.3g", measure, row.value)
    return row


def dense_flops(config: dict[str, Any], tokens: int) -> int:
    """Return the FLOPs of a training step under a dense mask, with the head on every row."""
    return flops(sizes_of(config), tokens=tokens, pairs=tokens * tokens, scored=tokens)


def dense_mask(model: Embedder, step: Step, config: dict[str, Any], n: int, rounds: int) -> Row:
    """IB by segments over IB by a dense 4D mask and the model's own labels."""
    sequence = ib(n, n, config["vocab_size"])
    ours = step(packed_loss(model, [sequence]))
    theirs = step(dense_loss(model, sequence))
    return ratio(
        f"ib_over_dense_mask_{n}",
        interleaved(ours, theirs, rounds),
        goal=0.70,
        better="lower",
        floor=0.85,
        theory=ib_flops(config, n, n) / dense_flops(config, len(sequence)),
        about=f"training step on [X={n}; B=4; Y={n}] over the same weights called as a Hugging "
        "Face model with a dense 4D mask and labels (SDPA, head on all rows); losses equal",
    )


def dense_loss(model: Embedder, sequence: Sequence) -> Callable[[], Tensor]:
    """The same loss in the usual way. Raises RuntimeError when it is not the same."""
    tokens = torch.tensor([sequence.context + sequence.target])
    labels = tokens.clone()
    labels[:, : len(sequence.context)] = -100
    mask = dense_ib_mask(sequence)[None, None]

    def run() -> Tensor:
        model.backbone.set_attn_implementation("sdpa")
        return model.backbone(tokens, attention_mask=mask, labels=labels, use_cache=False).loss

    with torch.no_grad():
        ours, theirs = packed_loss(model, [sequence])().item(), run().item()
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        raise RuntimeError(f"the two ways disagree on the loss: {ours} and {theirs}")
    return run


def packed(model: Embedder, step: Step, config: dict[str, Any], longest: int, rounds: int) -> Row:
    """Packed over padded at about half padding, as a share of what padding's absence promises."""
    lengths = spread_lengths(longest, 4)
    real, full = sum(lengths), len(lengths) * longest
    vocab = config["vocab_size"]
    sequences = [plain(0, n - 1, vocab) for n in lengths]
    ours = step(packed_loss(model, sequences))
    theirs = step(padded_loss(model, sequences, longest))
    ideal = full / real
    pairs = [(b / a, ideal) for a, b in interleaved(ours, theirs, rounds)]
    return ratio(
        "packed_over_padded_of_ideal",
        pairs,
        goal=0.95,
        better="higher",
        floor=0.85,
        theory=1.0,
        about=f"samples/s of a plain causal step, lengths {lengths}: packed over padded to "
        f"{longest} (SDPA with a padding mask, head on the real rows), over {ideal:.2f} = padded "
        "tokens / real tokens",
    )


def spread_lengths(longest: int, count: int) -> list[int]:
    """`count` log-normal lengths, the largest `longest`, that fill about half of it on average."""
    rng = random.Random(1)
    drawn = [math.exp(rng.gauss(0, 0.6)) for _ in range(count)]
    lengths = [max(2, round(longest * x / max(drawn))) for x in drawn]
    excess = sum(lengths) / count / longest - 0.5
    rest = [i for i, n in enumerate(lengths) if n < longest]
    for i in rest:
        lengths[i] = min(longest, max(2, round(lengths[i] - excess * longest * count / len(rest))))
    return lengths


def padded_loss(model: Embedder, sequences: list[Sequence], width: int) -> Callable[[], Tensor]:
    """The mean loss of the same sequences, each filled up to `width` tokens."""
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        row = sequence.context + sequence.target
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    scored = mask[:, 1:].bool()
    targets = tokens[:, 1:][scored]

    def run() -> Tensor:
        model.backbone.set_attn_implementation("sdpa")
        hidden = model.backbone.base_model(
            tokens, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return model.head(hidden[:, :-1][scored], targets) / len(targets)

    with torch.no_grad():
        ours, theirs = packed_loss(model, sequences)().item(), run().item()
    if not math.isclose(ours, theirs, rel_tol=1e-4):
        raise RuntimeError(f"packed and padded disagree on the loss: {ours} and {theirs}")
    return run


def head_loss(count: int, words: int, width: int, rounds: int) -> list[Row]:
    """Memory and time of head and loss with all their gradients, chunked over plain."""
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(words, width).mul_(0.02).requires_grad_()
    targets = torch.tensor(random_ids(count, words))

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ib_generative_loss(hidden, weight, targets), (hidden, weight))

    def theirs() -> tuple[Tensor, ...]:
        loss = cross_entropy(linear(hidden, weight), targets, reduction="sum")
        return torch.autograd.grad(loss, (hidden, weight))

    def seconds(way: Callable[[], object]) -> Callable[[], float]:
        return lambda: timed_call(way)

    suffix = "" if width == 128 else f"_width_{width}"
    about = f"{count} rows x {words} words, width {width}, fp32, both gradients counted"
    memory = [(float(peak_bytes(ours)), float(peak_bytes(theirs)))]
    times = interleaved(seconds(ours), seconds(theirs), rounds)
    gradients = (count + words) * width * 4  # bytes that either way has to leave behind
    return [
        ratio(
            f"head_loss_memory{suffix}",
            memory,
            goal=0.15,
            better="lower",
            floor=0.30,
            theory=gradients / memory[0][1],
            about=f"peak of chunked over plain head and cross-entropy, {about}; theory: the "
            "gradients alone",
        ),
        ratio(
            f"head_loss_time{suffix}",
            times,
            goal=1.0,
            better="lower",
            floor=1.05,
            theory=1.0,
            about=f"seconds of the same, {about}",
        ),
    ]


def timed_call(way: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = clock()
    way()
    return clock() - begin
