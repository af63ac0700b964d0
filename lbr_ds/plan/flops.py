"""Floating-point operations of a forward and a backward, by arithmetic alone. No torch.

The strict count: every linear weight once per token, the head only on the rows with a loss, and
attention only on the query-key pairs that the rule allows (half of a square for causal attention).
Recomputation, masked pairs and padding do not count. Published figures of model FLOPs utilization
(MFU) often count the whole square, and are higher for the same speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder with gated MLPs (Llama, Qwen2, Mistral) that FLOPs depend on.

    Attributes:
        inner: width of the MLP.
        head_size: width of one attention head.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    @property
    def body(self) -> int:
        """Weights of the layers' matrices: query, key, value, output, and the MLP's three."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.hidden * self.vocab


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Read the sizes from the fields of a Hugging Face config.json."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    default = 128 if config.get("model_type") == "qwen3" else hidden // heads
    return Sizes(
        hidden=hidden,
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or default,
        vocab=config["vocab_size"],
    )


def causal_pairs(length: int) -> int:
    """Return the query-key pairs of plain causal attention over `length` tokens."""
    return length * (length + 1) // 2


def bottleneck_pairs(source: int, bottleneck: int, target: int) -> int:
    """Return the pairs of `[X ; B ; Y]`, in which Y sees B and earlier Y and never X.

    Args:
        source: tokens of X.
        bottleneck: tokens of B.
        target: tokens of Y.
    """
    return causal_pairs(source + bottleneck) + target * bottleneck + causal_pairs(target)


def flops(
    sizes: Sizes, *, tokens: int, pairs: int, scored: int = 0, passes: int = 3, adapters: int = 0
) -> int:
    """Return the FLOPs of a forward, or of a forward and a backward.

    Args:
        sizes: of the model.
        tokens: tokens that pass through the layers.
        pairs: query-key pairs of attention.
        scored: rows that pass through the head.
        passes: 3 for a forward and a backward (twice the forward's work), 1 for a forward alone.
        adapters: weights of adapters, if only these are trainable; the frozen weights then need no
            gradient, which is a third of their work.
    """
    linear = sizes.body * tokens + sizes.head * scored
    # Scores and their sum over values: 2 FLOPs each for every element of a head.
    attention = 2 * sizes.heads * sizes.head_size * sizes.layers * pairs
    frozen = 2 * linear if adapters and passes == 3 else 0
    return 2 * passes * (linear + attention + adapters * tokens) - frozen
