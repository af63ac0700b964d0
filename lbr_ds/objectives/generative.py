"""IB generative loss: predict Y through the bottleneck (paper, section 3.2).

    L_IB-GL = - sum_t log p(y_t | B, y_<t)

It is the next-token loss of the tokens of Y, whose states come from attention that hides X from Y
(`ib_segments.py`). All that the answer can use of X must pass through the bottleneck's states.

With a causal language model of transformers in your own training loop:

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lbr_ds.batching import Sequence, pack
    >>> from lbr_ds.model.attention import packed_forward, use_ib_attention
    >>> from lbr_ds.objectives.generative import ib_generative_loss
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4))
    >>> use_ib_attention(model)
    >>> x, b, y = [5, 6, 7], [62, 63], [8, 9, 1]       # token ids of X, B and Y
    >>> batch = pack([Sequence(context=x + b, num_bottleneck=2, target=y)])
    >>> states = packed_forward(model, batch).last_hidden_state[0]
    >>> loss = ib_generative_loss(states[batch.read], model.lm_head.weight, batch.targets)
    >>> loss.backward()

The gradient reaches X only through B.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lbr_ds.objectives.kinds import Kinds
from lbr_ds.objectives.linear_cross_entropy import NO_ROWS, AddedRows, linear_cross_entropy


def ib_generative_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    added_rows: AddedRows = NO_ROWS,
    kinds: Kinds | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the next-token loss of the supervised rows, an fp32 scalar; with K kinds (1 + K,).

    fp32 whatever the inputs' dtype: a sum in bf16 would be wrong by percents.

    Args:
        hidden: (R, D) final states of the rows that predict a token of Y.
        weight: (V, D) weight of the language-model head, of the states' dtype; it may be frozen.
        targets: (R,) int64, the token that each row predicts.
        reduction: over the rows.
        added_rows: a pair (K, D), (K,): what is added to which rows of `weight`.
        kinds: see `linear_cross_entropy`.
        chunk: rows of logits held at a time; None: as `head_chunk` chooses.
    """
    loss = linear_cross_entropy(
        hidden, weight, targets[:, None], added_rows=added_rows, kinds=kinds, chunk=chunk
    )
    return loss / len(targets) if reduction == "mean" else loss
