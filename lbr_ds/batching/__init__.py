"""Samples -> token ids with segments -> packed batches. Shared by training, evaluation and export.

Shape legend, used in every room that handles tensors: T tokens of a packed batch, N sequences,
R read-out rows, K bottleneck tokens, D hidden size, H heads, V vocabulary, C gathered candidates.
"""

from __future__ import annotations

from lbr_ds.batching.pack import (
    Bags,
    PackedBatch,
    fill_by_tokens,
    pack,
    split_by_tokens,
)
from lbr_ds.batching.tokenizer import Sequence, TextTokenizer

__all__ = [
    "Bags",
    "PackedBatch",
    "Sequence",
    "TextTokenizer",
    "fill_by_tokens",
    "pack",
    "split_by_tokens",
]
