"""The language-model head and its loss as one module: next-token cross-entropy, row chunk by chunk.

It lies inside the engine's forward because ZeRO-3 gathers a weight only for the module that owns it
(a loss on `lm_head.weight` outside sees an empty shard), and goes in chunks because the logits of
1024 rows x 150k words would outweigh the model's activations. The gradients are made during the
forward, chunk by chunk, so no logits outlive their chunk and nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MIN_ROWS, _MAX_ROWS = 128, 1024


class Head(nn.Module):
    """Holds the head's weight (tied or not) as its own parameter."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the rows' losses, fp32 scalar. hidden (R, D), targets (R,) int64."""
        return linear_cross_entropy(hidden, self.weight, targets)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """sum_r -log softmax(hidden[r] @ weight.T)[targets[r]] in fp32, logits never whole.

    hidden (R, D) and weight (V, D) of one dtype, targets (R,) int64. The value is fp32 whatever the
    inputs' dtype; a bf16 sum would be off by percents. chunk: rows at a time; None: D / 3, within
    bounds. The chunk's logits then hold a third of what the weight's gradient holds anyway, and are
    large enough that adding to that gradient once a chunk costs little.
    """
    if chunk is None:
        chunk = min(max(hidden.shape[1] // 3, _MIN_ROWS), _MAX_ROWS)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient would be made all the same
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # fp32: many small chunks added up in bf16 would lose the small ones.
        sums = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=sums) if want_weight else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = torch.mm(hidden[rows], weight.T).to(sums)
            picked = logits.gather(1, targets[rows, None])
            # In place from here on: torch's logsumexp would hold the chunk three times over.
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            loss += (total.log() + top - picked).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one_hot, written over the logits.
            slope = logits.div_(total)
            slope.scatter_add_(1, targets[rows, None], torch.full_like(picked, -1.0))
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if grad_weight.dtype == slope.dtype:
                    grad_weight.addmm_(slope.T, hidden[rows])
                else:
                    grad_weight += slope.T @ hidden[rows]
            del logits, slope  # else they would stand beside the next chunk's
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden * slope.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(slope.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None
