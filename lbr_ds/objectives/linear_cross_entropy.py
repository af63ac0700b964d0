"""Cross-entropy of a linear head on hidden states, without ever holding all logits.

Shared by the two losses of stage 1 (`generative.py`, `bag_of_words.py`). The logits of 1,024 rows
and 150,000 tokens would need more memory than the model's activations. So they are computed a chunk
of rows at a time, and the gradients are computed during the forward: no logits outlive their chunk,
and nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lbr_ds.objectives.head_chunk import head_chunk

# (K, D) and (K,): what is added to which rows of a weight; it has a gradient of its own.
AddedRows = tuple[Tensor | None, Tensor | None]
NO_ROWS: AddedRows = (None, None)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    tokens: Tensor,
    shares: Tensor,
    *,
    added_rows: AddedRows = NO_ROWS,
    chunk: int | None = None,
) -> Tensor:
    """Return sum_i -shares[i] * log softmax(hidden[rows[i]] @ weight.T)[tokens[i]], an fp32 scalar.

    Args:
        hidden: (R, D) states.
        weight: (V, D), of the states' dtype; it may be frozen.
        rows: (W,) int64, ascending: the state that predicts each token.
        tokens: (W,) int64 token ids.
        shares: (W,) weights; those of one row add up to 1.
        added_rows: a pair (K, D), (K,): what is added to which rows of `weight`.
        chunk: rows of logits held at a time; None: as `head_chunk` chooses.
    """
    added, at = added_rows
    if not torch.is_grad_enabled():  # the forward below would compute gradients nevertheless
        weight, added = weight.detach(), None if added is None else added.detach()
    return _LinearCrossEntropy.apply(hidden, weight, added, at, rows, tokens, shares, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        added: Tensor | None,
        at: Tensor | None,
        rows: Tensor,
        tokens: Tensor,
        shares: Tensor,
        chunk: int | None,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # fp32: a sum of many small chunks in bf16 would lose the small ones.
        sums = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=sums) if needs_weight else None
        grad_added = torch.zeros_like(added, dtype=sums) if added is not None else None
        if chunk is None:
            chunk = head_chunk(len(hidden), hidden.shape[1])
        starts = range(0, len(hidden), chunk)
        bounds = torch.searchsorted(rows, rows.new_tensor([*starts, len(hidden)])).tolist()
        for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
            part = hidden[start : start + chunk]
            logits = torch.mm(part, weight.T).to(sums)
            if added is not None:
                logits[:, at] += torch.mm(part, added.T)
            labels = (rows[first:last] - start) * weight.shape[0] + tokens[first:last]
            share = shares[first:last].to(sums)
            label_logits = logits.view(-1)[labels] @ share
            # In place from here on: torch's logsumexp would hold the chunk three times.
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            loss += (total.log() + largest).sum() - label_logits
            if not any(ctx.needs_input_grad[:3]):
                continue
            # d loss / d logits = softmax - shares, written over the logits.
            slope = logits.div_(total)
            slope.view(-1).scatter_add_(0, labels, -share)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[start : start + chunk])
                if added is not None:
                    grad_hidden[start : start + chunk].addmm_(slope[:, at], added)
            if grad_added is not None:
                grad_added += slope[:, at].T @ part
            if grad_weight is not None:
                if grad_weight.dtype == slope.dtype:
                    grad_weight.addmm_(slope.T, part)
                else:
                    grad_weight += slope.T @ part
            del logits, slope  # before the next chunk's are allocated
        ctx.grads = [
            None if grad is None else grad.to(weight.dtype)
            for grad in (grad_hidden, grad_weight, grad_added)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        hidden, weight, added = (
            None if grad is None else grad.mul_(slope.to(grad.dtype)) for grad in grads
        )
        return hidden, weight, added, None, None, None, None, None
