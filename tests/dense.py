"""The oracle of IB attention: the rule written as a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from lbr_ds.batching import Sequence


def dense_mask(sequences: list[Sequence]) -> Tensor:
    """(T, T) bool, true where a row may look: causal, own sequence, and Y never at X."""
    total = sum(len(s) for s in sequences)
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for seq in sequences:
        for i in range(len(seq)):
            for j in range(i + 1):
                in_target = i >= len(seq.context)
                in_source = j < len(seq.context) - seq.num_bottleneck
                mask[start + i, start + j] = not (seq.cut and in_target and in_source)
        start += len(seq)
    return mask
