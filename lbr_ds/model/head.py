"""The language-model head and its losses as one module, row chunk by chunk.

Next-token cross-entropy, and if wanted that of a bag of words (`stage1.bag_of_words`).

It lies inside the engine's forward because ZeRO-3 gathers a weight only for the module that owns it
(a loss on `lm_head.weight` outside sees an empty shard), and goes in chunks because the logits of
1024 rows x 150k words would outweigh the model's activations. The gradients are made during the
forward, chunk by chunk, so no logits outlive their chunk and nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lbr_ds.batching import Bags
from lbr_ds.model.head_chunk import head_chunk

Extra = tuple[Tensor | None, Tensor | None]
NONE: Extra = (None, None)


class Head(nn.Module):
    """Holds the head's weight (tied or not) as its own parameter."""

    more: nn.Parameter | None
    at: Tensor | None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("more", None)
        self.register_buffer("at", None, persistent=False)

    def add(self, more: nn.Parameter, at: Tensor) -> None:
        """From now on the weight's rows `at` (K,) count as themselves plus `more` (K, D)."""
        self.more, self.at = more, at

    def forward(self, hidden: Tensor, targets: Tensor, bags: Bags | None = None) -> Tensor:
        """Sum of the rows' losses, fp32 scalar. hidden (R, D), targets (R,) int64.

        With bags (2,): that sum, and the sum of the bags' losses.
        """
        extra = (self.more, self.at)
        told = linear_cross_entropy(hidden, self.weight, targets, extra=extra)
        if bags is None:
            return told
        bagged = bag_cross_entropy(hidden[bags.read], self.weight, bags, extra=extra)
        return torch.stack([told, bagged])


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, extra: Extra = NONE
) -> Tensor:
    """sum_r -log softmax(hidden[r] @ weight.T)[targets[r]] in fp32, logits never whole.

    hidden (R, D) and weight (V, D) of one dtype, targets (R,) int64. The value is fp32 whatever the
    inputs' dtype; a bf16 sum would be off by percents. chunk: rows at a time; None: D / 2 at most,
    within bounds. The chunk's logits then hold half of what the weight's gradient holds anyway, and
    are large enough that adding to that gradient once a chunk costs little. extra (K, D), (K,):
    what is added to which rows of the weight; it has a gradient of its own, so the weight may be
    frozen.
    """
    rows = torch.arange(len(targets), device=targets.device)
    shares = torch.ones(len(targets), dtype=torch.float32, device=targets.device)
    return _cross_entropy(hidden, weight, extra, rows, targets, shares, chunk)


def bag_cross_entropy(
    hidden: Tensor, weight: Tensor, bags: Bags, chunk: int | None = None, extra: Extra = NONE
) -> Tensor:
    """sum_n mean_{w in bag n} -log softmax(hidden[n] @ weight.T)[w] in fp32, as above.

    hidden (N, D): one state a bag. It is to tell all words of a text at once, whatever their order.
    """
    shares = 1 / torch.bincount(bags.bag, minlength=len(hidden)).float()
    return _cross_entropy(hidden, weight, extra, bags.bag, bags.word, shares[bags.bag], chunk)


def _cross_entropy(hidden: Tensor, weight: Tensor, extra: Extra, *asked: Any) -> Tensor:
    more, at = extra
    if not torch.is_grad_enabled():  # else gradients would be made all the same
        weight, more = weight.detach(), None if more is None else more.detach()
    return _LinearCrossEntropy.apply(hidden, weight, more, at, *asked)


class _LinearCrossEntropy(torch.autograd.Function):
    """Entry i asks of row rows[i] (they ascend) the share shares[i] of word words[i]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        more: Tensor | None,
        at: Tensor | None,
        rows: Tensor,
        words: Tensor,
        shares: Tensor,
        chunk: int | None,
    ) -> Tensor:
        want_hidden, want_weight, want_more = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # fp32: many small chunks added up in bf16 would lose the small ones.
        sums = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        grad_weight = torch.zeros_like(weight, dtype=sums) if want_weight else None
        grad_more = None if more is None or not want_more else torch.zeros_like(more, dtype=sums)
        if chunk is None:
            chunk = head_chunk(len(hidden), hidden.shape[1])
        starts = range(0, len(hidden), chunk)
        bounds = torch.searchsorted(rows, rows.new_tensor([*starts, len(hidden)])).tolist()
        for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
            part = hidden[start : start + chunk]
            logits = torch.mm(part, weight.T).to(sums)
            if more is not None:
                logits[:, at] += torch.mm(part, more.T)
            asked = (rows[first:last] - start) * weight.shape[0] + words[first:last]
            share = shares[first:last].to(sums)
            picked = logits.view(-1)[asked] @ share
            # In place from here on: torch's logsumexp would hold the chunk three times over.
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            loss += (total.log() + top).sum() - picked
            if not any(ctx.needs_input_grad[:3]):
                continue
            # d loss / d logits = softmax - shares, written over the logits.
            slope = logits.div_(total)
            slope.view(-1).scatter_add_(0, asked, -share)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[start : start + chunk])
                if more is not None:
                    grad_hidden[start : start + chunk].addmm_(slope[:, at], more)
            if grad_more is not None:
                grad_more += slope[:, at].T @ part
            if grad_weight is not None:
                if grad_weight.dtype == slope.dtype:
                    grad_weight.addmm_(slope.T, part)
                else:
                    grad_weight += slope.T @ part
            del logits, slope  # else they would stand beside the next chunk's
        ctx.grads = [
            None if grad is None else grad.to(weight.dtype)
            for grad in (grad_hidden, grad_weight, grad_more)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        hidden, weight, more = (
            None if grad is None else grad.mul_(slope.to(grad.dtype)) for grad in grads
        )
        return hidden, weight, more, None, None, None, None, None
