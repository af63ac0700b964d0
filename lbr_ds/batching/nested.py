"""A nested bottleneck: each step trains with the first k of K tokens, so one model serves any k.

A text with k tokens is what a model with `bottleneck.count=k` reads: `[X ; B_0 ... B_{k-1}]`.
"""

from __future__ import annotations

import numpy as np

from lbr_ds.batching.tokenizer import TextTokenizer
from lbr_ds.config import BottleneckConfig

_PURPOSE = 0x6E657374  # keeps this random stream apart from others of the same seed


def nested_counts(count: int) -> list[int]:
    """Return the numbers of tokens that are trained: 1, 2, 4, ... and `count` itself."""
    return [*(1 << i for i in range((count - 1).bit_length())), count]


def tokenizer_of_step(
    tokenizer: TextTokenizer, bottleneck: BottleneckConfig, seed: int, step: int
) -> TextTokenizer:
    """Return the tokenizer of a step: with a drawn number of tokens if the bottleneck is nested.

    All samples of all ranks have the same number in a step, so that vectors of one kind are
    compared. It depends on seed and step alone: a resumed run draws the same.
    """
    if not bottleneck.nested:
        return tokenizer
    counts = nested_counts(bottleneck.count)
    # Raw PCG64 output: numpy guarantees it, and not what Generator's methods make of it (NEP 19).
    raw = np.random.PCG64(np.random.SeedSequence([seed, _PURPOSE, step])).random_raw()
    return tokenizer.at(counts[raw % len(counts)])
