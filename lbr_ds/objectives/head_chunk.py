"""How many rows of logits the language-model head holds at a time. Torch-free, for the planner."""

from __future__ import annotations

import math

_MIN_ROWS, _MAX_ROWS = 128, 1024


def head_chunk(rows: int, hidden: int) -> int:
    """Return the number of rows whose logits are computed at once.

    At most half of the hidden size, within bounds: the logits of a chunk then take half of what the
    weight's gradient takes anyway, and are large enough that adding to that gradient once a chunk
    costs little. All chunks are of one size, or nearly.

    Args:
        rows: rows of hidden states with a loss.
        hidden: the model's hidden size.
    """
    most = min(max(hidden // 2, _MIN_ROWS), _MAX_ROWS)
    return math.ceil(rows / math.ceil(rows / most)) if rows else 1
