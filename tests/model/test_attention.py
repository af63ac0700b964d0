"""IB attention equals its rule written as a dense mask; X reaches Y through B and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from lbr_ds.batching import Sequence, pack
from lbr_ds.errors import ConfigError
from lbr_ds.model.attention import segment_attention
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder
from tests.dense import dense_mask
from tests.tiny import backbone

# Contexts, bottlenecks and targets of unlike lengths; no target; no bottleneck; not cut.
SEQUENCES = [
    Sequence(list(range(7)), 3, list(range(5))),
    Sequence(list(range(4)), 2),
    Sequence(list(range(6)), 0, list(range(6)), cut=False),
    Sequence(list(range(90)), 4, [1]),
    Sequence(list(range(3)), 3, list(range(40))),
    Sequence(list(range(7)), 3, list(range(5))),
]


def heads(total: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, total, 8, dtype=torch.float64, generator=generator)


def test_values_and_gradients_equal_the_dense_mask() -> None:
    batch = pack(SEQUENCES)
    tensors = [heads(batch.num_tokens, n, i).requires_grad_() for i, n in enumerate((4, 2, 2))]
    found, _ = segment_attention(nn.Module(), *tensors, None, segments=batch.segments, scaling=0.3)
    wanted = scaled_dot_product_attention(
        *tensors, attn_mask=dense_mask(SEQUENCES), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    slope = torch.randn(wanted.shape, dtype=torch.float64)
    assert (found - wanted).abs().max() <= 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, slope),
        torch.autograd.grad(wanted, tensors, slope),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-12


def test_half_precision_rounds_at_the_end_alone() -> None:
    """On CPU ranks: values and gradients of bf16 numbers are those of fp32, rounded once."""
    batch = pack([s for s in SEQUENCES if s.target and s.num_bottleneck])
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        own = [heads(batch.num_tokens, n, i).bfloat16() for i, n in enumerate((4, 2, 2))]
        tensors = [x.to(dtype).requires_grad_() for x in own]
        found, _ = segment_attention(nn.Module(), *tensors, None, segments=batch.segments)
        assert found.dtype == dtype
        slope = torch.ones_like(found)
        query, key, value = torch.autograd.grad(found, tensors, slope)
        plain = slice(0, 4)  # rows that stand once: those of B add two rounded parts up
        results.append([found, query[:, :, plain], key[:, :, plain], value[:, :, plain]])
    for half, full in zip(*results, strict=True):
        assert torch.equal(half, full.bfloat16())


def test_bidirectional_equals_the_block_mask() -> None:
    sequences = [s for s in SEQUENCES if not s.target] + [
        Sequence([0] * 30, 2),
        Sequence([0] * 9, 2),
    ]
    batch = pack(sequences)
    tensors = [heads(batch.num_tokens, 2, i) for i in range(3)]
    found, _ = segment_attention(
        nn.Module(), *tensors, None, segments=batch.segments, bidirectional=True
    )
    blocks = torch.block_diag(*[torch.ones(len(s), len(s)) for s in sequences]).bool()
    wanted = scaled_dot_product_attention(*tensors, attn_mask=blocks).transpose(1, 2)
    assert (found - wanted).abs().max() <= 1e-12


def test_nan_in_the_source_never_reaches_the_target() -> None:
    sequence = Sequence(list(range(9)), 2, list(range(6)))
    batch = pack([sequence, sequence])
    query, key, value = (heads(batch.num_tokens, 2, i) for i in range(3))
    key[:, :, :7] = value[:, :, :7] = float("nan")
    out, _ = segment_attention(nn.Module(), query, key, value, None, segments=batch.segments)
    assert out[0, :9].isnan().any()
    assert out[0, 9:].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_every_family_hides_the_source(tmp_path: Path, family: str) -> None:
    """Through a whole model: with B's own states pinned, the target's loss ignores X."""
    model = AutoModelForCausalLM.from_pretrained(backbone(tmp_path, family), dtype=torch.float64)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="sdpa"
    )
    embedder = Embedder(model, Card(2, 32, "last", "causal"))
    sequences = [Sequence([5, 9, 17, 30, 31], 2, [40, 41, 42]), Sequence([8, 30, 31], 2, [7] * 9)]
    found = embedder(pack(sequences))
    wanted = torch.zeros((), dtype=torch.float64)
    for seq in sequences:
        ids = torch.tensor([seq.context + seq.target])
        logits = dense(ids, attention_mask=dense_mask([seq])[None, None]).logits[0]
        rows = logits[len(seq.context) - 1 : -1]
        wanted += nn.functional.cross_entropy(rows, torch.tensor(seq.target), reduction="sum")
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)


def test_target_sees_the_source_only_through_the_bottleneck(tmp_path: Path) -> None:
    """Changing X moves Y's loss; changing X with a bottleneck of width 0 does not."""
    model = AutoModelForCausalLM.from_pretrained(backbone(tmp_path), dtype=torch.float64)
    embedder = Embedder(model, Card(2, 32, "last", "causal"))

    def target_states(first: int, num_bottleneck: int) -> Tensor:
        batch = pack([Sequence([first, 9, 17, 30, 31], num_bottleneck, [40, 41, 42])])
        return embedder.backbone.base_model(
            input_ids=batch.ids, position_ids=batch.positions, segments=batch.segments
        ).last_hidden_state[0, 5:]

    assert not torch.equal(target_states(5, 2), target_states(6, 2))
    assert torch.equal(target_states(5, 0), target_states(6, 0))


def test_what_it_cannot_do_is_refused() -> None:
    batch = pack([Sequence([0] * 9, 2)])
    tensors = [heads(9, 2, i) for i in range(3)]
    with pytest.raises(ConfigError, match="sliding window of 4"):
        segment_attention(nn.Module(), *tensors, None, segments=batch.segments, sliding_window=4)
    with pytest.raises(ConfigError, match="softcap"):
        segment_attention(nn.Module(), *tensors, None, segments=batch.segments, softcap=30.0)
    with pytest.raises(ConfigError, match="without segments"):
        segment_attention(nn.Module(), *tensors, None)
