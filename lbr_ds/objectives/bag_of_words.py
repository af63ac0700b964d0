"""Bag-of-words loss: one state predicts all tokens of Y at once, whatever their order.

    L_bag = - mean_{w in set(Y)} log softmax(W h)_w          h: the last bottleneck state

An addition to the paper's stage 1 (`stage1.bag_of_words`). The next-token loss is satisfied when
the bottleneck holds what each next token needs beside the tokens before it; this one asks the state
that becomes the embedding for the content of Y by itself.

    >>> import torch
    >>> from lbr_ds.objectives.bag_of_words import bag_of_words_loss
    >>> _ = torch.manual_seed(0)
    >>> states, weight = torch.randn(2, 8, requires_grad=True), torch.randn(50, 8)
    >>> tokens = torch.tensor([[3, 9, 49], [7, -1, -1]])    # a bag of three tokens, and one of one
    >>> loss = bag_of_words_loss(states, weight, tokens)
    >>> first = -(states[0] @ weight.T).log_softmax(0)[[3, 9, 49]].mean()
    >>> second = -(states[1] @ weight.T).log_softmax(0)[7]
    >>> torch.allclose(loss, (first + second) / 2)
    True
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lbr_ds.objectives.linear_cross_entropy import NO_ROWS, AddedRows, linear_cross_entropy


def bag_of_words_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    added_rows: AddedRows = NO_ROWS,
    chunk: int | None = None,
) -> Tensor:
    """Return the loss of N bags, an fp32 scalar; each bag's loss is the mean over its tokens.

    Args:
        hidden: (N, D), one state for each bag.
        weight: (V, D) weight of the language-model head, of the states' dtype; it may be frozen.
        tokens: (N, M) int64 token ids, distinct within a bag; -1 fills up a bag that has fewer, but
            at least one.
        reduction: over the bags.
        added_rows: a pair (K, D), (K,): what is added to which rows of `weight`.
        chunk: rows of logits held at a time; None: as `head_chunk` chooses.
    """
    loss = linear_cross_entropy(hidden, weight, tokens, added_rows=added_rows, chunk=chunk)
    return loss / len(hidden) if reduction == "mean" else loss
