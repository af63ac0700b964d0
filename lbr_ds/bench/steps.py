"""Whole training steps of stage 1 on random sequences, compared with plain causal training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lbr_ds.batching import Sequence, pack
from lbr_ds.bench.measure import Comparison
from lbr_ds.bench.workload import ib, ib_flops, plain, plain_flops
from lbr_ds.cluster.device import clock
from lbr_ds.model.embedder import Embedder

Step = Callable[[Callable[[], Tensor]], Callable[[], float]]


def timed_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Return a function that times a training step: forward, backward, optimizer."""

    def run() -> float:
        begin = clock()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - begin

    return run


def packed_loss(model: Embedder, sequences: list[Sequence]) -> Callable[[], Tensor]:
    """Return a function that computes the mean loss of the packed sequences."""
    batch = pack(sequences).to(model.head.weight.device)
    assert batch.targets is not None
    count = len(batch.targets)
    return lambda: with_ours(model)(batch) / count


def with_ours(model: Embedder) -> Embedder:
    """Set IB attention on the model, whose weights are shared with a peer that sets another."""
    model.backbone.set_attn_implementation("lbr_ib")
    return model


def sft(model: Embedder, step: Step, config: dict[str, Any], n: int, count: int) -> Comparison:
    """Compare IB-SFT with plain SFT at X = Y = n."""
    vocab = config["vocab_size"]
    return Comparison(
        step(packed_loss(model, [ib(n, n, vocab) for _ in range(count)])),
        step(packed_loss(model, [plain(n, n, vocab) for _ in range(count)])),
        theory=ib_flops(config, n, n) / plain_flops(config, n, n),
        about=f"training step, {count} x [X={n}; B=4; Y={n}] over {count} x [X={n}; Y={n}], both "
        "packed, head on Y's rows only",
    )


def reconstruct(
    model: Embedder, step: Step, config: dict[str, Any], n: int, count: int
) -> Comparison:
    """Compare reconstruction of passages of n tokens with plain language modelling on them."""
    vocab = config["vocab_size"]
    return Comparison(
        step(packed_loss(model, [ib(n, n, vocab) for _ in range(count)])),
        step(packed_loss(model, [plain(0, n, vocab) for _ in range(count)])),
        theory=ib_flops(config, n, n) / plain_flops(config, 0, n),
        about=f"training step, {count} x [X={n}; B=4; Y={n}] over plain pre-training on "
        f"{count} x {n} tokens",
    )
