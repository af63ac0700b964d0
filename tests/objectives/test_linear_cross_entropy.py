"""The chunked head equals plain cross-entropy, values and gradients, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from lbr_ds.objectives.bag_of_words import bag_of_words_loss
from lbr_ds.objectives.generative import ib_generative_loss


@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (37,))
    found = ib_generative_loss(hidden, weight, targets, reduction="sum", chunk=chunk) * 0.3
    wanted = cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.3
    assert torch.allclose(found, wanted, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(wanted, (hidden, weight)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_bags_equal_the_mean_over_their_words(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    words = [[3, 9, 49], [7], [0, 3], [11, 12, 13, 14]]
    owner = torch.tensor([n for n, bag in enumerate(words) for _ in bag])
    tokens = torch.tensor([word for bag in words for word in bag])
    found = bag_of_words_loss(hidden, weight, owner, tokens, reduction="sum", chunk=chunk)
    mean = bag_of_words_loss(hidden, weight, owner, tokens, chunk=chunk)
    assert mean.item() == pytest.approx(found.item() / 4)
    wanted = sum(-(hidden[n] @ weight.T).log_softmax(0)[bag].mean() for n, bag in enumerate(words))
    assert torch.allclose(found, wanted, rtol=1e-6)  # shares are fp32
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(wanted, (hidden, weight)),
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("chunk", [1, 10, 100])
def test_added_rows_equal_a_weight_that_holds_them(chunk: int) -> None:
    """Also where the weight itself is frozen."""
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    more = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    at, targets = torch.tensor([49, 7, 30]), torch.randint(0, 50, (37,))
    wanted = cross_entropy(hidden @ weight.index_add(0, at, more).T, targets, reduction="sum")
    slopes = torch.autograd.grad(wanted, (hidden, more, weight))
    for learning in ((hidden, more, weight), (hidden, more)):
        own = weight if len(learning) == 3 else weight.detach()
        found = ib_generative_loss(
            hidden, own, targets, reduction="sum", added_rows=(more, at), chunk=chunk
        )
        assert torch.allclose(found, wanted, rtol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(found, learning), slopes, strict=False):
            assert (ours - theirs).abs().max() <= 1e-12


def test_bf16_loss_is_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 16).bfloat16(), torch.randn(90, 16).bfloat16()
    targets = torch.randint(0, 90, (600,))
    found = ib_generative_loss(hidden, weight, targets, chunk=64)
    wanted = cross_entropy(hidden.float() @ weight.float().T, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=2e-3)
