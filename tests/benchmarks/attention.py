"""Suite `attention`: the operation alone, forward and all gradients, on the shape of SmolLM2-135M.

IB by segments against one dense mask over `[X ; B ; Y]`, against plain causal attention over as
many tokens, and short sequences packed against one call each. `theory` counts query-key pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lbr_ds.batching import Sequence
from lbr_ds.bench.attention import by_mask, by_segments, operands, seconds
from lbr_ds.bench.measure import ROUNDS, Row, interleaved, ratio
from lbr_ds.bench.workload import BOTTLENECK, SMALL, ib
from lbr_ds.plan.flops import bottleneck_pairs, causal_pairs
from tests.benchmarks.stage1 import spread_lengths
from tests.benchmarks.texts import TINY

QUICK = {"rounds": 1, "config": TINY, "lengths": (16,)}


def suite(
    rounds: int = ROUNDS, config: dict[str, Any] = SMALL, lengths: tuple[int, ...] = (512, 2048)
) -> list[Row]:
    """Rows for X = Y = each length, then the row of short sequences."""
    torch.manual_seed(0)
    rows = []
    for n in lengths:
        sequence = ib(n, n, 2)
        allowed = bottleneck_pairs(n, BOTTLENECK, n)
        ours = by_segments([sequence], config)
        found = interleaved(ours, by_mask(sequence, config), rounds)
        rows.append(
            ratio(
                f"ib_attention_over_dense_{n}",
                found,
                goal=0.4,
                better="lower",
                floor=0.6,
                theory=allowed / len(sequence) ** 2,
                about=f"attention alone, [X={n}; B=4; Y={n}]: segments over SDPA with a dense mask",
            )
        )
        whole = [Sequence(sequence.context, 0, sequence.target, cut=False)]
        found = interleaved(ours, by_segments(whole, config), rounds)
        rows.append(
            ratio(
                f"ib_attention_over_causal_{n}",
                found,
                goal=0.7,
                better="lower",
                floor=0.9,
                theory=allowed / causal_pairs(len(sequence)),
                about=f"attention alone, [X={n}; B=4; Y={n}] over plain causal on as many tokens",
            )
        )
    short = [Sequence([0] * n, BOTTLENECK) for n in spread_lengths(48, 64)]
    found = interleaved(by_segments(short, config), one_by_one(short, config), rounds)
    about = "attention alone, 64 texts of 48 tokens at most: packed over a call for each"
    rows.append(
        ratio("packed_attention_over_loop", found, goal=0.7, better="lower", floor=1.0, about=about)
    )
    return rows


def one_by_one(sequences: list[Sequence], config: dict[str, Any]) -> Callable[[], float]:
    """A call of plain causal attention for each sequence."""
    tensors = operands(sum(len(s) for s in sequences), config, "cpu", torch.float32)
    lengths = [len(s) for s in sequences]

    def attend() -> Tensor:
        parts = zip(*(x.split(lengths, dim=2) for x in tensors), strict=True)
        return torch.cat(
            [
                scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                for q, k, v in parts
            ],
            dim=2,
        )

    return seconds(tensors, attend)
