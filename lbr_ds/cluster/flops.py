"""What a forward and a backward must compute, by arithmetic alone. No torch.

The strict count: every linear weight once a token, the head only on the rows that are scored, and
attention only on the query-key pairs that the rule allows (half a square for causal attention).
Nothing that is recomputed, masked out or padding counts. Published figures of model FLOPs
utilisation often take the whole square, and so come out higher for the same speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs (Llama, Qwen2, Mistral): what its size in FLOPs depends on."""

    hidden: int
    inner: int  # width of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From the fields of a Hugging Face config.json."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
        )

    @property
    def body(self) -> int:
        """Weights of the layers' matrices: query, key, value, output, and the MLP's three."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.hidden * self.vocab


def causal_pairs(length: int) -> int:
    """Query-key pairs of plain causal attention over `length` tokens."""
    return length * (length + 1) // 2


def bottleneck_pairs(source: int, bottleneck: int, target: int) -> int:
    """Pairs of `[X ; B ; Y]` in which Y sees B and earlier Y, never X (tokens of X, B and Y)."""
    return causal_pairs(source + bottleneck) + target * bottleneck + causal_pairs(target)


def flops(
    shape: Shape, *, tokens: int, pairs: int, scored: int = 0, passes: int = 3, adapters: int = 0
) -> int:
    """FLOPs of `tokens` tokens with `pairs` query-key pairs and `scored` rows through the head.

    passes: 3 for a forward and a backward (twice the forward's work), 1 for a forward alone.
    adapters: weights of adapters, where these alone learn: frozen ones need no gradient, a third of
    their work.
    """
    linear = shape.body * tokens + shape.head * scored
    # Scores and their sum over values: 2 FLOPs each for every element of a head.
    attention = 2 * shape.heads * shape.head_size * shape.layers * pairs
    frozen = 2 * linear if adapters and passes == 3 else 0
    return 2 * passes * (linear + attention + adapters * tokens) - frozen
