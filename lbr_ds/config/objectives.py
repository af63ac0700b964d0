"""The stage-1 objectives: what X and Y are, and what Y sees (paper, section 3.2). No torch.

| objective        | X       | Y       | Y sees          |                                       |
|------------------|---------|---------|-----------------|---------------------------------------|
| `ib_sft`         | query   | answer  | B, earlier Y    | the method on pairs                   |
| `ib_reconstruct` | passage | passage | B, earlier Y    | the method on plain text              |
| `ib_continue`    | prefix  | suffix  | B, earlier Y    | the method on plain text              |
| `ib_uncut`       | query   | answer  | X, B, earlier Y | control: `ib_sft` without its cut     |
| `plain_sft`      | query   | answer  | X, earlier Y    | baseline without a bottleneck         |
| `plain_lm`       |         | passage | earlier Y       | baseline without a bottleneck         |

An answer is one of a record's positives. `bottleneck.separator` says what is between X and Y of
`plain_sft`. `batching/generative.py` makes the sequences; the planner counts their tokens and
query-key pairs from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Objective:
    """What the sequence `[X ; B ; Y]` of one objective is made of.

    Attributes:
        x: what X is; empty: there is no X, and Y follows a single end token.
        bottleneck: whether the K bottleneck tokens follow X.
        y_sees_x: whether the rows of Y attend to those of X.
    """

    x: Literal["query", "passage", "prefix", ""]
    bottleneck: bool
    y_sees_x: bool

    @property
    def cut(self) -> bool:
        """Whether B is all that Y sees of X: the information bottleneck."""
        return self.bottleneck and not self.y_sees_x

    def longest(
        self, *, max_length: int, max_target_length: int, num_bottleneck: int
    ) -> tuple[int, int]:
        """Return the tokens of the longest sequence: (of the context `[X ; B]`, of the target Y).

        Of a tokenizer that puts no token before a text; one that does may add a token to a prefix.

        Args:
            max_length: tokens of a context at most (`model.max_length`).
            max_target_length: tokens of a target at most (`stage1.max_target_length`).
            num_bottleneck: K.
        """
        if not self.x:
            return 1, max_target_length
        if self.x == "prefix":  # of a text of both lengths, cut in the middle where that fits
            half = min((max_length + max_target_length) // 2, max_length - num_bottleneck)
            return half + num_bottleneck, max_target_length
        return max_length, max_target_length


OBJECTIVES = {
    "ib_sft": Objective("query", bottleneck=True, y_sees_x=False),
    "ib_reconstruct": Objective("passage", bottleneck=True, y_sees_x=False),
    "ib_continue": Objective("prefix", bottleneck=True, y_sees_x=False),
    "ib_uncut": Objective("query", bottleneck=True, y_sees_x=True),
    "plain_sft": Objective("query", bottleneck=False, y_sees_x=True),
    "plain_lm": Objective("", bottleneck=False, y_sees_x=True),
}
