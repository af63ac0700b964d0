"""Learn a teacher's similarities of each query to all candidates, from its vectors.

With the student's cosines s_ij of query i and candidate j, those of the teacher t_ij, and the
candidates of all ranks:

    p_i = softmax(t_i / tau_t),  q_i = softmax(s_i / tau)
    KL_i     = sum_j p_ij (log p_ij - log q_ij)
    cosine_i = 1 - (s_i . t_i) / (|s_i| |t_i|)

Only similarities are compared, so teacher and student may differ in dimension. KL of in-batch
similarities: Fang et al. 2021 (SEED, arXiv 2101.04731). Every candidate that the teacher knows
counts, an unlabelled answer too: the teacher says how near it is. Gather the candidates as
`info_nce` does. As there, a tile of rows is scored at a time, and its gradients computed at once.

    >>> import torch
    >>> from torch.nn.functional import kl_div, normalize
    >>> from lbr_ds.objectives.teacher_vectors import teacher_vectors_loss
    >>> _ = torch.manual_seed(0)
    >>> queries, candidates = (normalize(torch.randn(n, 8), dim=-1) for n in (4, 6))
    >>> known, wanted = (normalize(torch.randn(n, 20), dim=-1) for n in (4, 6))    # the teacher's
    >>> loss, stats = teacher_vectors_loss(
    ...     queries.requires_grad_(), candidates, known, wanted, "kl",
    ...     temperature=0.05, teacher_temperature=0.1,
    ... )
    >>> student = (queries @ candidates.T / 0.05).log_softmax(1)
    >>> teacher = (known @ wanted.T / 0.1).softmax(1)
    >>> torch.allclose(loss, kl_div(student, teacher, reduction="sum"))
    True
    >>> loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lbr_ds.objectives.info_nce import MIN_ROWS, NO_PREFIXES, TILE
from lbr_ds.objectives.teacher_scores import STATS


def teacher_vectors_loss(
    queries: Tensor,
    candidates: Tensor,
    teacher_queries: Tensor,
    teacher_candidates: Tensor,
    loss: Literal["kl", "cosine"],
    *,
    temperature: float,
    teacher_temperature: float,
    prefixes: Mapping[int, float] = NO_PREFIXES,
    tile: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the queries' losses, and statistics as sums.

    Computed in fp32, or in the student's own dtype where that is wider.

    Args:
        queries: (n, D), of unit length.
        candidates: (C, D), of unit length.
        teacher_queries: (n, E), of unit length; a row of nan: the teacher does not know the query.
        teacher_candidates: (C, E), the same for the candidates.
        loss: kl or cosine.
        temperature: tau, for kl.
        teacher_temperature: tau_t, for kl.
        prefixes: {number of leading components: weight of its loss}, as in `info_nce`.
        tile: scores held at a time, as in `info_nce`.

    Returns:
        The loss, (L_D + sum_d w_d L_d) / (1 + sum_d w_d), and without gradient of the whole
        vectors: `distillation_loss`, and `distilled`, the number of queries that count.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    tile = max(TILE, MIN_ROWS * len(candidates)) if tile is None else tile
    rows, columns = (v.isfinite().all(1) for v in (teacher_queries, teacher_candidates))
    rows = rows & columns.any()
    columns = columns | ~columns.any()  # then all losses have the weight 0, and are finite
    known = [v.to(dtype).nan_to_num() for v in (teacher_queries, teacher_candidates)]
    scoring = _Scoring(loss, temperature, teacher_temperature, tile)

    def of(size: int | None) -> Tensor:
        own = [v.to(dtype) for v in (queries, candidates)]
        if size is not None:
            own = [normalize(v[:, :size], dim=1) for v in own]
        found: Tensor = _Rows.apply(*own, *known, rows, columns, scoring)
        return found

    whole = of(None)
    total = whole + sum(weight * of(size) for size, weight in prefixes.items())
    stats = dict(zip(STATS, (whole.detach(), rows.sum()), strict=True))
    return total / (1 + sum(prefixes.values())), stats


class _Scoring(NamedTuple):
    """What `teacher_vectors_loss` takes beside tensors."""

    loss: str
    temperature: float
    teacher_temperature: float
    tile: int


class _Rows(torch.autograd.Function):
    """Sum of the queries' losses; the gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        c: Tensor,
        teacher_q: Tensor,
        teacher_c: Tensor,
        rows: Tensor,
        columns: Tensor,
        scoring: _Scoring,
    ) -> Tensor:
        need = ctx.needs_input_grad[:2]
        grads = (torch.empty_like(q) if need[0] else None, torch.zeros_like(c) if need[1] else None)
        loss = q.new_zeros(())
        count = max(1, scoring.tile // len(c))
        for start in range(0, len(q), count):
            part = slice(start, start + count)
            losses, slope = _compare(q[part] @ c.T, teacher_q[part] @ teacher_c.T, columns, scoring)
            weight = rows[part].to(q.dtype)
            loss += losses @ weight
            slope *= weight[:, None]
            if grads[0] is not None:
                torch.mm(slope, c, out=grads[0][part])
            if grads[1] is not None:
                grads[1].addmm_(slope.T, q[part])
        ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place, so once
        return (*(None if grad is None else grad.mul_(slope) for grad in grads), *[None] * 5)


def _compare(
    student: Tensor, teacher: Tensor, columns: Tensor, scoring: _Scoring
) -> tuple[Tensor, Tensor]:
    """Return (losses (rows,), d losses / d student cosines (rows, C)) of one tile of cosines."""
    if scoring.loss == "cosine":
        student, teacher = student * columns, teacher * columns
        lengths = [v.norm(dim=1, keepdim=True).clamp_min(1e-12) for v in (student, teacher)]
        student, teacher = student / lengths[0], teacher / lengths[1]
        agreement = (student * teacher).sum(1, keepdim=True)
        return 1 - agreement[:, 0], (student * agreement - teacher) / lengths[0]
    never = float("-inf")
    p = teacher.div_(scoring.teacher_temperature).masked_fill_(~columns, never).softmax(1)
    log_q = student.div_(scoring.temperature).masked_fill_(~columns, never).log_softmax(1)
    slope = (log_q.exp() - p).div_(scoring.temperature)
    losses = -(torch.special.entr(p) + p * log_q.masked_fill_(~columns, 0)).sum(1)
    return losses, slope
