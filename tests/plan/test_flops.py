"""The FLOP count against torch's own counter, and its pairs against the mask written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from lbr_ds.batching import Sequence
from lbr_ds.config import LoraConfig
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder
from lbr_ds.model.lora import adapt
from lbr_ds.plan.flops import bottleneck_pairs, causal_pairs, flops, sizes_of
from lbr_ds.plan.shape import (
    shape_of_config,
    with_adapters,
)
from lbr_ds.plan.work import Work
from tests.dense import dense_mask
from tests.plan.models import module
from tests.tiny import SHAPE


@pytest.mark.parametrize(("source", "bottleneck", "target"), [(7, 3, 5), (1, 4, 9), (6, 0, 2)])
def test_pairs_are_those_of_the_mask(source: int, bottleneck: int, target: int) -> None:
    sequence = Sequence([0] * (source + bottleneck), bottleneck, [0] * target)
    assert bottleneck_pairs(source, bottleneck, target) == dense_mask([sequence]).sum()
    whole = Sequence([0] * source, 0, [0] * target, cut=False)
    assert causal_pairs(source + target) == dense_mask([whole]).sum()


def test_a_step_counts_what_torch_counts() -> None:
    """torch counts the whole square of attention; so the pairs given are all of them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=96))
    model.set_attn_implementation("eager")
    tokens = torch.randint(96, (1, 11))
    shape = sizes_of(model.config.to_dict())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    forward = flops(shape, tokens=11, pairs=121, scored=11, passes=1)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    assert counter.get_total_flops() == flops(shape, tokens=11, pairs=121, scored=11)


def test_flops_are_those_that_torch_counts() -> None:
    """A share of one-token sequences: no pairs but their own, every product counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    model = module("llama")
    ids = torch.randint(0, 384, (32, 1))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    shape = shape_of_config(model.config.to_dict(), "llama")
    work = Work(1, 32, 1, 1, 0, 0.0, 32, 1, False, 0, 0)
    assert work.useful_flops(shape) == pytest.approx(counted, rel=0.02)


def test_flops_with_adapters_are_those_that_torch_counts() -> None:
    """Frozen weights pass gradients on and get none."""
    from torch.utils.flop_counter import FlopCounterMode

    model = module("llama")
    lora = LoraConfig(rank=16)
    adapt(Embedder(model, Card(1, 64, "last", "causal")), lora=lora, new=[1])
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, 384, (32, 1))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    shape = with_adapters(shape_of_config(model.config.to_dict(), "llama"), lora, 1)
    work = Work(1, 32, 1, 1, 0, 0.0, 32, 1, False, 0, 0)
    assert work.useful_flops(shape) == pytest.approx(counted, rel=0.02)
