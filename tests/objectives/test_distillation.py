"""Losses that learn from a teacher: tiles against the whole, and what does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lbr_ds.objectives.teacher_scores import teacher_scores_loss
from lbr_ds.objectives.teacher_vectors import teacher_vectors_loss


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1).to(dtype)


def dense(q: Tensor, c: Tensor, tq: Tensor, tc: Tensor, loss: str) -> Tensor:
    student, teacher = q @ c.T, tq @ tc.T
    if loss == "cosine":
        return (1 - cosine_similarity(student, teacher, dim=1)).sum()
    p = (teacher / 0.3).softmax(1)
    return (p * (p.log() - (student / 0.1).log_softmax(1))).sum()


@pytest.mark.parametrize("loss", ["kl", "cosine"])
@pytest.mark.parametrize("tile", [1, 40, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiles_are_the_whole(loss: Any, tile: int | None, dtype: torch.dtype) -> None:
    q, c = (unit(n, 6, seed=n, dtype=dtype).requires_grad_() for n in (7, 11))
    tq, tc = (unit(n, 20, seed=n).half() for n in (8, 11))
    tq = tq[:7]
    found, stats = teacher_vectors_loss(
        q, c, tq, tc, loss, temperature=0.1, teacher_temperature=0.3, tile=tile
    )
    (3 * found).backward()
    grads = [q.grad, c.grad]
    whole = [v.detach().double().requires_grad_() for v in (q, c)]
    wanted = dense(*whole, tq.double(), tc.double(), loss)
    (3 * wanted).backward()
    close = (
        {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(found.double(), wanted, **close)
    for ours, theirs in zip(grads, whole, strict=True):
        assert ours is not None
        assert theirs.grad is not None
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.grad, **close)
    assert int(stats["distilled"]) == 7


@pytest.mark.parametrize("loss", ["kl", "cosine"])
def test_a_teacher_that_knows_nothing(loss: Any) -> None:
    """Also one that knows queries and no candidate: a loss of 0 without a gradient."""
    q, c = unit(3, 4, seed=1).requires_grad_(), unit(5, 4, seed=2).requires_grad_()
    lost, known = torch.full((5, 2), torch.nan), unit(3, 2, seed=3)
    for tq in (known, lost[:3]):
        found, stats = teacher_vectors_loss(
            q, c, tq, lost, loss, temperature=0.1, teacher_temperature=0.1
        )
        grads = torch.autograd.grad(found, (q, c))
        assert float(found.detach()) == 0
        assert int(stats["distilled"]) == 0
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_scores_are_compared_by_their_differences(loss: Any) -> None:
    q, p, c = unit(4, 6, seed=1), unit(4, 6, seed=2), unit(4, 3, 6, seed=3)
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scores[1, 2] = torch.nan
    temperatures = {"temperature": 0.1, "teacher_temperature": 0.7}
    found, _ = teacher_scores_loss(q, p, c, scores, loss, **temperatures)
    moved, _ = teacher_scores_loss(q, p, c, scores + 100, loss, **temperatures)
    torch.testing.assert_close(moved, found)
    # A student that has the teacher's scores has nothing to learn.
    cosines = torch.cat([(q * p).sum(1)[:, None], torch.einsum("nd,nmd->nm", q, c)], 1)
    agreed, stats = teacher_scores_loss(q, p, c, cosines * 7 - 2, loss, **temperatures)
    torch.testing.assert_close(agreed, torch.zeros_like(agreed), rtol=0, atol=1e-12)
    assert int(stats["distilled"]) == 4


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_without_scores_there_is_no_loss(loss: Any) -> None:
    q, p, c = (
        v.requires_grad_() for v in (unit(2, 6, seed=1), unit(2, 6, seed=2), unit(2, 1, 6, seed=3))
    )
    scores = torch.tensor([[torch.nan, 1.0], [2.0, torch.nan]])
    found, stats = teacher_scores_loss(
        q, p, c, scores, loss, temperature=0.1, teacher_temperature=1.0
    )
    assert float(found.detach()) == int(stats["distilled"]) == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(found, (q, p, c)))
