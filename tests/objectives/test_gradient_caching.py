"""Gradients by chunks equal those of one graph, also beside a rank with more chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lbr_ds.objectives.gradient_caching import chunk_loss, vector_gradients
from lbr_ds.objectives.info_nce import info_nce


@pytest.mark.parametrize("count", [None, 3, 5])
def test_equals_one_graph(count: int | None) -> None:
    torch.manual_seed(0)
    model, texts = torch.nn.Linear(5, 4).double(), torch.randn(12, 5, dtype=torch.float64)
    chunks = [torch.tensor([0, 7, 11]), torch.tensor([1, 2, 3, 4, 8]), torch.tensor([5, 6, 9, 10])]
    graphs = []

    def encode(index: int) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        rows = chunks[index] if index < len(chunks) else chunks[0]
        return normalize(model(texts[rows]), dim=-1)

    def loss_of(vectors: Tensor) -> tuple[Tensor, float]:
        loss, stats = info_nce(vectors[:4], vectors[4:], temperature=0.1)
        return loss, float(stats["loss"])

    gradients, value = vector_gradients(encode, chunks, loss_of, count)
    assert graphs == [False] * (count or 3)
    for index, rows in enumerate(chunks):
        chunk_loss(encode(index), gradients[rows]).backward()
    loss, wanted = loss_of(normalize(model(texts), dim=-1))
    assert value == pytest.approx(wanted, rel=1e-12)
    for ours, theirs in zip(
        (p.grad for p in model.parameters()),
        torch.autograd.grad(loss, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
