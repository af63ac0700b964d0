"""Random backbones of known shapes, random sequences, and the FLOPs of a step on them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lbr_ds.batching import Sequence
from lbr_ds.cluster.synthetic import random_ids
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder
from lbr_ds.plan.flops import bottleneck_pairs, causal_pairs, flops, sizes_of
from lbr_ds.plan.shape import known_backbones

BOTTLENECK = 4
DEMO = next(name for name in known_backbones() if "SmolLM2-135M" in name)


def config_of(backbone: str) -> dict[str, Any]:
    """Return the config.json of a backbone in the planner's table, for long sequences."""
    return {**known_backbones()[backbone]["config"], "max_position_embeddings": 32768}


SMALL = config_of(DEMO)
TINY: dict[str, Any] = {  # a backbone for short versions
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "vocab_size": 128,
}


def random_model(
    config: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a causal LM of that shape with random weights, the same ones at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, trust_remote_code=False
        )


def embedder(model: PreTrainedModel) -> Embedder:
    """Return an embedder with IB attention that shares the model's weights."""
    return Embedder(model, Card(BOTTLENECK, 32768, "last", "causal"))


def ib(source: int, target: int, vocab: int) -> Sequence:
    """Return a random sequence `[X ; B ; Y]` in which Y does not see X."""
    context = random_ids(source + BOTTLENECK, vocab)
    return Sequence(context, BOTTLENECK, random_ids(target, vocab))


def plain(source: int, target: int, vocab: int) -> Sequence:
    """Return a random causal sequence `[X ; Y]` with its loss on Y; source 0: only Y."""
    return Sequence(random_ids(max(source, 1), vocab), 0, random_ids(target, vocab), cut=False)


def ib_flops(config: dict[str, Any], source: int, target: int) -> int:
    """Return the FLOPs of a training step on one `ib` sequence."""
    pairs = bottleneck_pairs(source, BOTTLENECK, target)
    tokens = source + BOTTLENECK + target
    return flops(sizes_of(config), tokens=tokens, pairs=pairs, scored=target)


def plain_flops(config: dict[str, Any], source: int, target: int) -> int:
    """Return the FLOPs of a training step on one `plain` sequence."""
    tokens = source + target
    return flops(sizes_of(config), tokens=tokens, pairs=causal_pairs(tokens), scored=target)
