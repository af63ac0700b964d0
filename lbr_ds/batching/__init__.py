"""Samples -> token ids with segments -> packed batches. Shared by training, evaluation and export.

Shape legend, used in every room that handles tensors: T tokens of a packed batch, N sequences,
R read-out rows, K bottleneck tokens, D hidden size, H heads, V vocabulary, C gathered candidates.
"""

from __future__ import annotations

from lbr_ds.batching.encode import Sequence, TextEncoder
from lbr_ds.batching.pack import (
    Bags,
    PackedBatch,
    fill_by_tokens,
    pack,
    split_by_tokens,
)

__all__ = [
    "Bags",
    "PackedBatch",
    "Sequence",
    "TextEncoder",
    "fill_by_tokens",
    "pack",
    "split_by_tokens",
]
