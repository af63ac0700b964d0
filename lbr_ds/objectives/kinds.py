"""Sums of what belongs to each kind of rows, for statistics by source."""

from __future__ import annotations

import torch
from torch import Tensor

# (n,) int64 and K: the kind of each row, a number below K; a row of kind -1 belongs to none.
Kinds = tuple[Tensor, int]


def sum_by_kind(values: Tensor, kinds: Kinds | None, rows: slice) -> Tensor:
    """Return (..., K), the sums of values (..., len(rows)) over the rows of each kind; K = 0: None.

    A product, because a sum by index has no fixed order on a GPU.
    """
    if kinds is None:
        return values.new_zeros(*values.shape[:-1], 0)
    kind, count = kinds
    member = kind[rows, None] == torch.arange(count, device=values.device)
    return values @ member.to(values.dtype)
