"""How many floating-point operations a step is worth: useful ones, counted strictly.

One convention for every MFU that this program prints. A multiply-add is 2 operations; backward
costs twice the forward, so forward and backward are 6 a weight and token. Counted: the linear
layers on every token, the head on supervised tokens only, attention on allowed query-key pairs
only (causal, cut at the bottleneck). Not counted: recomputed activations, gradient caching's second
forward, embedding look-ups, norms. This is stricter than the counts behind most published figures,
which take attention as the full square (llm-foundry, torchtitan).
"""

from __future__ import annotations


def causal_pairs(length: int) -> int:
    """Query-key pairs of one causal sequence."""
    return length * (length + 1) // 2


def bottleneck_pairs(context: int, bottleneck: int, target: int) -> int:
    """Pairs of `[X ; B ; Y]` with Y cut off from X. context: tokens of X and B together."""
    return causal_pairs(context) + target * bottleneck + causal_pairs(target)


def step_flops(
    *, linear: int, head: int, layers: int, heads: int, head_size: int,
    tokens: float, supervised: float, pairs: float,
) -> float:  # fmt: skip
    """Useful operations of forward and backward.

    linear: weights of all linear layers without the head; head: weights of the head;
    supervised: tokens that go through the head; pairs: summed over the sequences.
    """
    attention = 12 * layers * heads * head_size * pairs  # 2 products, forward and backward
    return 6 * linear * tokens + 6 * head * supervised + attention
