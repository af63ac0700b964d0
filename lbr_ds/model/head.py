"""The language-model head as one module: the losses of stage 1 inside the engine's forward.

ZeRO-3 gathers a weight only while the module that owns it runs: a loss on `lm_head.weight` outside
of the forward would see an empty shard.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbr_ds.batching import Bags
from lbr_ds.objectives.bag_of_words import bag_of_words_loss
from lbr_ds.objectives.generative import ib_generative_loss
from lbr_ds.objectives.kinds import Kinds


class Head(nn.Module):
    """Holds the head's weight (tied or not) as its own parameter."""

    added: nn.Parameter | None
    at: Tensor | None

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("added", None)
        self.register_buffer("at", None, persistent=False)

    def add_rows(self, added: nn.Parameter, at: Tensor) -> None:
        """Count the weight's rows `at` (K,) as themselves plus `added` (K, D) from now on."""
        self.added, self.at = added, at

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        bags: Bags | None = None,
        kinds: Kinds | None = None,
    ) -> Tensor:
        """Return the sum of the rows' losses, an fp32 scalar.

        With K kinds (1 + K,): also the part of each kind. With bags one more: their loss.

        Args:
            hidden: (R, D) final states.
            targets: (R,) int64 token ids.
            bags: what the bag-of-words loss predicts.
            kinds: see `linear_cross_entropy`.
        """
        rows = (self.added, self.at)
        loss = ib_generative_loss(
            hidden, self.weight, targets, reduction="sum", added_rows=rows, kinds=kinds
        )
        if bags is None:
            return loss
        bag_loss = bag_of_words_loss(
            hidden[bags.read], self.weight, bags.tokens, reduction="sum", added_rows=rows
        )
        return torch.cat([torch.atleast_1d(loss), bag_loss[None]])
