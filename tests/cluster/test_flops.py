"""The FLOP count against torch's own counter, and its pairs against the mask written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lbr_ds.batching import Sequence
from lbr_ds.cluster.flops import bottleneck_pairs, causal_pairs, flops, sizes_of
from tests.dense import dense_mask
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
