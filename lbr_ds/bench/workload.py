"""Random backbones of known shapes, random sequences, and the FLOPs of a step on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lbr_ds.batching import Sequence
from lbr_ds.cluster.flops import Shape, bottleneck_pairs, causal_pairs, flops
from lbr_ds.cluster.synthetic import random_ids
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder

BOTTLENECK = 4
_COMMON: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        **_COMMON,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        **_COMMON,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        **_COMMON,
    },
}
SMALL = SHAPES["smollm2-135m"]


def random_model(
    config: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM of that shape; its weights are drawn, the same ones at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, trust_remote_code=False
        )


def embedder(model: PreTrainedModel) -> Embedder:
    """The model with IB attention installed, sharing its weights."""
    return Embedder(model, Card(BOTTLENECK, 32768, "last", "causal"))


def ib(source: int, target: int, vocab: int) -> Sequence:
    """`[X ; B ; Y]` with Y cut off from X."""
    context = random_ids(source + BOTTLENECK, vocab)
    return Sequence(context, BOTTLENECK, random_ids(target, vocab))


def plain(source: int, target: int, vocab: int) -> Sequence:
    """`[X ; Y]`, plain causal, loss on Y; source 0: plain pre-training on Y."""
    return Sequence(random_ids(max(source, 1), vocab), 0, random_ids(target, vocab), cut=False)


def ib_flops(config: dict[str, Any], source: int, target: int) -> int:
    """Of one training step on one `ib` sequence."""
    pairs = bottleneck_pairs(source, BOTTLENECK, target)
    tokens = source + BOTTLENECK + target
    return flops(Shape.of(config), tokens=tokens, pairs=pairs, scored=target)


def plain_flops(config: dict[str, Any], source: int, target: int) -> int:
    """Of one training step on one `plain` sequence."""
    tokens = source + target
    return flops(Shape.of(config), tokens=tokens, pairs=causal_pairs(tokens), scored=target)


def dense_flops(config: dict[str, Any], tokens: int) -> int:
    """Of one training step under a dense mask, with the head on every row."""
    return flops(Shape.of(config), tokens=tokens, pairs=tokens * tokens, scored=tokens)
