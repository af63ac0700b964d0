"""Learn a teacher's scores of a query's own candidates: KL divergence or MarginMSE.

A teacher (a cross-encoder, a larger embedder) scored the positive and the hard negatives of query i
with t_i0, t_i1, ..., t_iM. With the student's cosines s_ij, z_ij = s_ij / tau and
y_ij = t_ij / tau_t:

    KL_i        = sum_j p_ij (log p_ij - log q_ij),   p_i = softmax(y_i), q_i = softmax(z_i)
    MarginMSE_i = mean_j ((z_i0 - z_ij) - (y_i0 - y_ij))^2,   j = 1..M

KL: distillation of a listwise distribution, as RocketQAv2 (Ren et al. 2021, arXiv 2110.07367)
trains its retriever. MarginMSE: Hofstaetter et al. 2020, arXiv 2010.02666. Both depend only on
differences between the scores of a query, so a teacher's scale counts and its zero does not.

A candidate without a score (nan) does not count; a query counts if its positive and at least one
negative have scores. Nothing is gathered from other ranks: all candidates are the query's own.

    >>> import torch
    >>> from torch.nn.functional import kl_div, normalize
    >>> from lbr_ds.objectives.teacher_scores import teacher_scores_loss
    >>> _ = torch.manual_seed(0)
    >>> queries = normalize(torch.randn(4, 8), dim=-1)
    >>> candidates = normalize(torch.randn(4, 3, 8), dim=-1)    # a positive and two negatives each
    >>> scores = torch.tensor([[9.0, 3, 1], [8, 8, 2], [7, 1, 0], [5, 4, float("nan")]])
    >>> loss, stats = teacher_scores_loss(
    ...     queries, candidates[:, 0], candidates[:, 1:], scores, "kl",
    ...     temperature=0.05, teacher_temperature=1.0,
    ... )
    >>> cosines = torch.einsum("nd,nmd->nm", queries, candidates)[:3]
    >>> student = (cosines / 0.05).log_softmax(1)
    >>> whole = kl_div(student, scores[:3].softmax(1), reduction="sum")
    >>> last = (queries[3] @ candidates[3, :2].T / 0.05).log_softmax(0)
    >>> whole += kl_div(last, scores[3, :2].softmax(0), reduction="sum")
    >>> torch.allclose(loss, whole), int(stats["distilled"])
    (True, 4)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lbr_ds.objectives.info_nce import NO_PREFIXES

STATS = ("distillation_loss", "distilled")


def teacher_scores_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    scores: Tensor,
    loss: Literal["kl", "margin_mse"],
    *,
    temperature: float,
    teacher_temperature: float,
    prefixes: Mapping[int, float] = NO_PREFIXES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the queries' losses, and statistics as sums.

    Computed in fp32, or in the vectors' own dtype where that is wider.

    Args:
        queries: (n, D), of unit length.
        positives: (n, D), of unit length.
        negatives: (n, M, D), of unit length.
        scores: (n, 1 + M), of the positive and the negatives; nan: no score.
        loss: kl or margin_mse.
        temperature: tau.
        teacher_temperature: tau_t.
        prefixes: {number of leading components: weight of its loss}, as in `info_nce`.

    Returns:
        The loss, (L_D + sum_d w_d L_d) / (1 + sum_d w_d), and without gradient of the whole
        vectors: `distillation_loss`, and `distilled`, the number of queries that count.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q, p, c = (vectors.to(dtype) for vectors in (queries, positives, negatives))
    counts = scores.isfinite()
    rows = counts[:, 0] & counts[:, 1:].any(1)
    counts |= ~rows[:, None]  # a query that does not count has finite numbers, and the weight 0
    scaled = torch.where(rows[:, None] & counts, scores, 0).to(dtype) / teacher_temperature
    measure = _kl if loss == "kl" else _margin_mse

    def of(size: int | None) -> Tensor:
        z = _cosines(q, p, c, size) / temperature
        return (measure(z, scaled, counts) * rows).sum()

    whole = of(None)
    total = whole + sum(weight * of(size) for size, weight in prefixes.items())
    stats = dict(zip(STATS, (whole.detach(), rows.sum()), strict=True))
    return total / (1 + sum(prefixes.values())), stats


def _cosines(queries: Tensor, positives: Tensor, negatives: Tensor, size: int | None) -> Tensor:
    """Return (n, 1 + M) cosines of the first `size` components; None: of the whole vectors."""
    q, p, c = (vectors[..., :size] for vectors in (queries, positives, negatives))
    own = torch.cat([(q * p).sum(-1)[:, None], torch.einsum("nd,nmd->nm", q, c)], 1)
    if size is None:
        return own
    lengths = torch.cat([p.norm(dim=-1)[:, None], c.norm(dim=-1)], 1)
    return own / (q.norm(dim=-1)[:, None] * lengths).clamp_min(1e-12)


def _kl(z: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Return (n,): the divergence of softmax(z) from softmax(y), over candidates that count."""
    p = y.masked_fill(~counts, float("-inf")).softmax(1)
    log_q = z.masked_fill(~counts, float("-inf")).log_softmax(1).masked_fill(~counts, 0)
    return -(torch.special.entr(p) + p * log_q).sum(1)


def _margin_mse(z: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Return (n,): the mean squared difference between margins, over negatives that count."""
    difference = (z[:, :1] - z[:, 1:]) - (y[:, :1] - y[:, 1:])
    squares = difference.square() * counts[:, 1:]
    return squares.sum(1) / counts[:, 1:].sum(1).clamp_min(1)
