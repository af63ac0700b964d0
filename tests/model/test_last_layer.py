"""A last layer that computes only the rows read equals one that computes all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lbr_ds.batching import Sequence, pack
from lbr_ds.model import embedder
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder
from tests.tiny import FAMILIES, backbone

EMBED = [Sequence([*range(5, 20)], 2), Sequence([*range(7, 12)], 2)]
LEARN = [Sequence([*range(5, 20)], 2, [4, 5, 6]), Sequence([*range(7, 12)], 2, [8, 9])]


def run(
    folder: Path, sequences: list[Sequence], checkpointing: bool, pooling: str = "last"
) -> tuple[Tensor, Tensor, list[int]]:
    """(output, all gradients in one row, how many rows the MLPs computed)."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = Embedder(model, Card(2, 32, pooling, "causal"))
    rows: list[int] = []
    for layer in model.base_model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda m, a, out: rows.append(out.shape[1]))
    out = whole(pack(sequences))
    forward = list(rows)
    generator = torch.Generator().manual_seed(0)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    grads = [p.grad.flatten() for p in whole.parameters() if p.grad is not None]
    return out.detach(), torch.cat(grads), forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sequences", [EMBED, LEARN], ids=["embed", "learn"])
def test_narrow_equals_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    checkpointing: bool,
    sequences: list[Sequence],
) -> None:
    folder = backbone(tmp_path, family)
    narrow = run(folder, sequences, checkpointing)
    monkeypatch.setattr(embedder, "_WORTH", 0.0)
    whole = run(folder, sequences, checkpointing)
    batch = pack(sequences)
    assert narrow[2] == [batch.num_tokens, len(batch.read)]
    assert whole[2] == [batch.num_tokens] * 2
    for ours, theirs in zip(narrow[:2], whole[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_mean_pooling_reads_every_row(tmp_path: Path) -> None:
    tokens = pack(EMBED).num_tokens
    assert run(backbone(tmp_path), EMBED, False, pooling="mean")[2] == [tokens, tokens]
