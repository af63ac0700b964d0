"""The chunked head equals plain cross-entropy, values and gradients, whatever the chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.objectives.bag_of_words import bag_of_words_loss
from lbr_ds.objectives.generative import ib_generative_loss
from lbr_ds.objectives.head_chunk import head_block, head_chunk
from lbr_ds.objectives.linear_cross_entropy import linear_cross_entropy

WORDS = torch.tensor([[3, 9, 49, -1], [7, -1, -1, -1], [0, 3, -1, -1], [11, 12, 13, 14]])


def assert_equal(found: Tensor, wanted: Tensor, inputs: tuple[Tensor, Tensor]) -> None:
    """The losses, and their gradients."""
    assert torch.allclose(found, wanted, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
def test_equals_plain_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (37,))
    found = ib_generative_loss(hidden, weight, targets, reduction="sum", chunk=chunk) * 0.3
    wanted = cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.3
    assert_equal(found, wanted, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_bags_equal_the_mean_over_their_words(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    found = bag_of_words_loss(hidden, weight, WORDS, reduction="sum", chunk=chunk)
    mean = bag_of_words_loss(hidden, weight, WORDS, chunk=chunk)
    assert mean.item() == pytest.approx(found.item() / 4)
    bags = [row[row >= 0] for row in WORDS]
    wanted = sum(-(hidden[n] @ weight.T).log_softmax(0)[bag].mean() for n, bag in enumerate(bags))
    assert_equal(found, wanted, (hidden, weight))


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


@pytest.mark.parametrize("chunk", [64, 600])
def test_bf16_is_as_close_as_its_numbers(chunk: int) -> None:
    """The loss is fp32; each gradient is off by the rounding of logits and slopes, and no more."""
    torch.manual_seed(0)
    vocab = 90
    assert head_block(vocab, gpu=False) > 1
    hidden = torch.randn(600, 16).bfloat16().requires_grad_()
    weight = torch.randn(vocab, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, vocab, (600,))
    found = ib_generative_loss(hidden, weight, targets, chunk=chunk)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = cross_entropy(wide[0] @ wide[1].T, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=1e-3)
    ours = torch.autograd.grad(found, (hidden, weight))
    for mine, theirs in zip(ours, torch.autograd.grad(wanted, wide), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() <= 8e-3 * theirs.norm()


def test_a_target_that_is_all_but_certain_keeps_its_gradient() -> None:
    """1 - p is 6e-4, which bf16 loses where it rounds p first."""
    hidden = torch.eye(2, 8).bfloat16().requires_grad_()
    weight = torch.zeros(3, 8)
    weight[0, :2] = 8.0
    loss = ib_generative_loss(hidden, weight.bfloat16(), torch.tensor([0, 0]), reduction="sum")
    (slope,) = torch.autograd.grad(loss, hidden)
    wanted = -8 * 2 / (2 + torch.tensor(8.0).exp())
    assert slope[0, 0].item() == pytest.approx(wanted.item(), rel=4e-3)


class Reads(TorchDispatchMode):
    """Collects the operations after which a host has waited for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if by_mask or name in (
            "_local_scalar_dense",
            "bincount",
            "equal",
            "masked_select",
            "nonzero",
            "repeat_interleave",
            "searchsorted",
            "unique",
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing() -> None:
    """A read in each chunk, or one alone, would make the host wait for all that is queued."""
    torch.manual_seed(0)
    hidden, weight, more = (torch.randn(n, 8, requires_grad=True) for n in (37, 50, 3))
    targets, at = torch.randint(0, 50, (37,)), torch.tensor([49, 7, 30])
    with Reads() as reads:
        loss = ib_generative_loss(hidden, weight, targets, added_rows=(more, at), chunk=10)
        loss = loss + bag_of_words_loss(hidden[:4], weight, WORDS, added_rows=(more, at), chunk=3)
        loss.backward()
        assert reads.found == []
        float(loss)
        assert reads.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_gradients_and_a_chunk_of_logits(dtype: torch.dtype) -> None:
    rows, vocab, size, width = 600, 3000, 16, dtype.itemsize
    hidden = torch.randn(rows, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, size, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    ib_generative_loss(hidden, weight, targets)
    peak = peak_bytes(lambda: ib_generative_loss(hidden, weight, targets).backward())
    chunk = head_chunk(rows, size, vocab, width, gpu=False)
    assert 1 < chunk < rows
    block = min(chunk, head_block(vocab, gpu=False)) * 4 if width == 2 else 0
    sums = vocab * size * (4 if width == 4 else 4 + 2 + 4)
    assert peak <= 1.05 * (vocab * (chunk * width + block) + sums + 2 * rows * size * width)


def test_a_gpu_holds_at_most_a_gibibyte_of_logits() -> None:
    for rows, vocab, width in [(8192, 151_936, 2), (100_000, 49_152, 2), (500, 32_000, 4)]:
        chunk = head_chunk(rows, 896, vocab, width, gpu=True)
        assert chunk * vocab * width <= 2**30
        count = -(-rows // chunk)
        # One chunk fewer would not fit.
        assert count == 1 or -(-rows // (count - 1)) * vocab * width > 2**30


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_sums_by_kind_are_those_of_the_rows_and_have_no_gradient(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(17, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 17, (11, 1), generator=generator)
    kind = torch.tensor([0, 2, -1] + [0, 2] * 4)
    found = linear_cross_entropy(hidden, weight, targets, kinds=(kind, 3), chunk=chunk)
    whole = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    losses = cross_entropy(hidden @ weight.T, targets[:, 0], reduction="none")
    assert found[0] == whole
    wanted = torch.stack([losses[kind == number].sum() for number in range(3)])
    torch.testing.assert_close(found[1:], wanted)
    # Whatever stands before the sums by kind changes nothing.
    slopes = torch.autograd.grad(
        (found * torch.tensor([3.0, 5.0, 7.0, 9.0])).sum(), (hidden, weight)
    )
    expected = torch.autograd.grad(3.0 * losses.sum(), (hidden, weight))
    for ours, theirs in zip(slopes, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
