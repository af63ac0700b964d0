"""Cross-entropy of a linear head on hidden states, without ever holding all logits.

Shared by the two losses of stage 1 (`generative.py`, `bag_of_words.py`). The logits of 8,000 rows
and 150,000 tokens would need more memory than the model's activations. So they are computed a chunk
of rows at a time, and the gradients are computed during the forward: no logits outlive their chunk,
and nothing is computed twice.

The sizes of chunks and blocks are in `head_chunk.py`. Nothing here reads a value back from the
device, so the host can queue the whole head without waiting for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbr_ds.objectives.head_chunk import head_block, head_chunk
from lbr_ds.objectives.kinds import Kinds, sum_by_kind

# (K, D) and (K,): what is added to which rows of a weight; it has a gradient of its own.
AddedRows = tuple[Tensor | None, Tensor | None]
NO_ROWS: AddedRows = (None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    added_rows: AddedRows = NO_ROWS,
    kinds: Kinds | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return sum_r -mean_m log softmax(hidden[r] @ weight.T)[targets[r, m]], an fp32 scalar.

    fp64 if the states are. With K kinds (1 + K,): that sum, and without gradient the part of it
    that the rows of each kind make up.

    Args:
        hidden: (R, D) states.
        weight: (V, D), of the states' dtype; it may be frozen.
        targets: (R, M) int64 token ids, distinct within a row; -1 fills up a row that has fewer,
            but at least one.
        added_rows: a pair (K, D), (K,): what is added to which rows of `weight`.
        kinds: the kind of each row; None: no sums by kind.
        chunk: rows of logits held at a time; None: as `head_chunk` chooses.
    """
    added, at = added_rows
    if not torch.is_grad_enabled():  # the forward below would compute gradients nevertheless
        weight, added = weight.detach(), None if added is None else added.detach()
    return _LinearCrossEntropy.apply(hidden, weight, added, at, targets, kinds, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        added: Tensor | None,
        at: Tensor | None,
        targets: Tensor,
        kinds: Kinds | None,
        chunk: int | None,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        by_kind = loss.new_zeros(kinds[1] if kinds else 0)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight, grad_added = None, None
        real = targets >= 0
        targets = targets.where(real, targets[:, :1])
        share = 1 / real.sum(1, keepdim=True).to(wide)
        if chunk is None:
            count, size = hidden.shape
            chunk = head_chunk(count, size, len(weight), weight.itemsize, gpu=hidden.is_cuda)
        only = len(hidden) <= chunk
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows]
            logits = torch.mm(part, weight.T)
            if added is not None and at is not None:  # by the sum in its dtype, as exports merge it
                logits.index_copy_(1, at, torch.mm(part, (weight[at] + added).T))
            own = logits.gather(1, targets[rows]).to(wide)
            total = _softmax_(logits, wide)
            losses = total - (own * real[rows]).sum(1, keepdim=True) * share[rows]
            loss += losses.sum()
            by_kind += sum_by_kind(losses[:, 0], kinds, rows)
            # d loss / d logits = softmax - share of the targets, written over the logits. The
            # targets' from the exact softmax: one near 1 leaves a difference that bf16 would lose.
            own.sub_(total).exp_().sub_(share[rows])
            slope = logits.scatter_(1, targets[rows], own.to(logits.dtype))
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if added is not None:
                own_slope = slope[:, at]
                if grad_hidden is not None:
                    grad_hidden[rows].addmm_(own_slope, added)
                grad_added = _add_product(grad_added, own_slope.T, part, only)
            if needs_weight:
                grad_weight = _add_product(grad_weight, slope.T, part, only)
            del logits, slope  # before the next chunk's are allocated
        ctx.grads, ctx.dtype = (grad_hidden, grad_weight, grad_added), weight.dtype
        return loss if kinds is None else torch.cat([loss[None], by_kind])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place, so once
        slope = slope[0] if slope.dim() else slope  # the sums by kind have no gradient
        return (*(_scaled(grad, slope, ctx.dtype) for grad in grads), *[None] * 4)


def _softmax_(logits: Tensor, wide: torch.dtype) -> Tensor:
    """Overwrite logits (n, V) by their softmax; return their log-sum-exp (n, 1), of dtype `wide`.

    bf16 logits are widened a block of rows at a time.
    """
    totals = logits.new_empty(len(logits), 1, dtype=wide)
    block = len(logits) if logits.dtype == wide else head_block(logits.shape[1], logits.is_cuda)
    for part, total in zip(logits.split(block), totals.split(block), strict=True):
        values = part.to(wide)
        largest = values.amax(1, keepdim=True)
        torch.softmax(values, 1, out=values)
        # The largest probability is 1 / sum exp(logits - largest).
        torch.sub(largest, values.amax(1, keepdim=True).log_(), out=total)
        if values is not part:
            part.copy_(values)
    return totals


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, only: bool) -> Tensor:
    """Return total + a @ b, written to `total` if there is one; `only`: it is the only product.

    A sum of several is fp32: in bf16 it would lose the small ones. On CUDA the product adds to it.
    """
    mixed = a.dtype.itemsize < 4 and not only
    if mixed and a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if total is None:
        product = torch.mm(a, b)
        return product.float() if mixed else product
    return total.add_(torch.mm(a, b)) if mixed else total.addmm_(a, b)


def _scaled(grad: Tensor | None, slope: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return grad * slope in `dtype`, written to `grad` where that has it."""
    if grad is None:
        return None
    if slope.is_cuda:
        slope = slope.reshape(1)  # a scalar would be rounded to bf16 before it multiplies
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    return torch.mul(grad, slope, out=out)
