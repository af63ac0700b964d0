"""InfoNCE over candidates gathered from all ranks (paper, section 3.3, equation 3).

    L_i = - log( exp(q_i . c_p(i) / tau) / sum_{j not masked for i} exp(q_i . c_j / tau) )

q_i: a query; c_p(i): its positive; c_j: every candidate, that is the positives of all queries and
mined hard negatives. All vectors have unit length, so the products are cosines.

Each rank scores its own queries against the candidates of all ranks, which are gathered with their
gradients; averaging the gradients over ranks is then right with no further factor (open_clip #616).
In a plain torch loop:

    candidates = gather_with_gradient(candidates)               # lbr_ds/distributed.py
    positives = rank * len(queries) + torch.arange(len(queries))
    loss, stats = info_nce(queries, candidates, temperature=0.02, positives=positives)

On one rank:

    >>> import torch
    >>> from torch.nn.functional import cross_entropy, normalize
    >>> from lbr_ds.objectives.info_nce import info_nce
    >>> _ = torch.manual_seed(0)
    >>> queries = normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    >>> candidates = normalize(torch.randn(6, 8), dim=-1)       # 4 positives, 2 hard negatives
    >>> loss, stats = info_nce(queries, candidates, temperature=0.05)
    >>> torch.allclose(loss, cross_entropy(queries @ candidates.T / 0.05, torch.arange(4)))
    True
    >>> loss.backward()

Which candidates are masked: `false_negatives.py`. Scores and mask of n queries and C candidates
would outgrow the model's own memory, so neither exists as a whole: a tile of rows is scored, its
loss is added and its gradients are computed, and the next tile takes its place.

**Matryoshka** (Kusupati et al. 2022, arXiv 2205.13147): with `prefixes={d: w_d}` the loss is also
computed on the first d components of all vectors, scaled to unit length again, so that a truncated
vector retrieves well too:

    L = (L_D + sum_d w_d L_d) / (1 + sum_d w_d)

Which candidates are negatives is decided once, by the whole vectors. A prefix costs no further
matrix product, since prefixes nest: it costs the softmax of its scores, and one more tile. No
truncated copy of the vectors is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lbr_ds.objectives.kinds import Kinds, sum_by_kind

TILE = 1 << 20  # scores in one tile: 4 MiB of fp32
# Rows of a tile at least. Every tile reads all candidates and their gradients, so with few rows the
# time of a batch grows with its cube.
MIN_ROWS = 32
NO_PREFIXES: Mapping[int, float] = {}
STATS = ("loss", "accuracy", "positive_cosine", "negative_cosine", "no_negatives")
# (n, C) bool, or a function that returns the part for a slice of the rows; True: no negative.
Mask = Tensor | Callable[[slice], Tensor]


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    *,
    temperature: float | Tensor,
    positives: Tensor | None = None,
    mask: Mask | None = None,
    margin: float | None = None,
    prefixes: Mapping[int, float] = NO_PREFIXES,
    kinds: Kinds | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    tile: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the queries, and statistics reduced as the loss is.

    Computed in fp32, or in the vectors' own dtype where that is wider.

    Args:
        queries: (n, D), of unit length.
        candidates: (C, D), of unit length.
        temperature: tau, or (n,) one of each query.
        positives: (n,) int64, the candidate that answers each query; None: candidate i of query i.
        mask: (n, C) bool, True for a candidate that is no negative of a query, or a function that
            returns such rows for a slice; a query's own positive is never masked.
        margin: also mask candidates whose cosine exceeds that of the positive by more than this
            (-2 to 2). Most of these are answers that nobody labelled: Qwen3-Embedding (arXiv
            2506.05176, section 3) uses 0.1; below 0 it also masks candidates that come close from
            below, as the absolute margin of NV-Retriever (arXiv 2407.15831). The choice has no
            gradient. None: no margin.
        prefixes: {number of leading components: weight of its loss}, for Matryoshka.
        kinds: (n,) int64 and K: the kind of each query, a number below K, for statistics by kind.
        reduction: over the queries.
        tile: scores held at a time (at least one row); None: TILE, or those of MIN_ROWS rows.

    Returns:
        The loss, and without gradient, of the whole vectors: `loss`, `accuracy` (share of queries
        whose positive scores highest), `positive_cosine`, `negative_cosine` (mean over a query's
        negatives) and `no_negatives` (share of queries that have none). Of each prefix d: `loss_d`
        and `accuracy_d`. Of each kind k: `loss/k` and `accuracy/k`, the part of it that the
        queries of that kind make up.
    """
    if positives is None:
        positives = torch.arange(len(queries), device=queries.device)
    tile = max(TILE, MIN_ROWS * len(candidates)) if tile is None else tile
    scoring = _Scoring(temperature, margin, dict(prefixes), tile, kinds)
    loss, stats = _InfoNCE.apply(queries, candidates, positives, mask, scoring)
    if reduction == "mean":
        loss, stats = loss / len(queries), stats / len(queries)
    names = [*STATS, *(f"{name}_{size}" for size in prefixes for name in STATS[:2])]
    names += [f"{name}/{kind}" for name in STATS[:2] for kind in range(kinds[1] if kinds else 0)]
    return loss, dict(zip(names, stats, strict=True))


@dataclass(frozen=True)
class _Scoring:
    """What `info_nce` takes beside tensors, as described there."""

    temperature: float | Tensor
    margin: float | None
    prefixes: dict[int, float]
    tile: int
    kinds: Kinds | None

    def temperature_of(self, rows: slice, like: Tensor) -> float | Tensor:
        """Return tau of these queries: a number, or (rows, 1) of the dtype of `like`."""
        if isinstance(self.temperature, Tensor):
            return self.temperature[rows, None].to(like.dtype)
        return self.temperature

    def by_kind(self, rows: slice, sums: Tensor) -> Tensor:
        """Return (2, K), the rows of loss and accuracy of `sums` (5, rows), summed by kind."""
        return sum_by_kind(sums[:2], self.kinds, rows)


class _InfoNCE(torch.autograd.Function):
    """Sum of the queries' losses, and the stats; the gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        positives: Tensor,
        mask: Mask | None,
        scoring: _Scoring,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        q, c = queries.to(dtype), candidates.to(dtype)
        need = ctx.needs_input_grad[:2]
        grads = tuple(
            torch.zeros_like(x) if wanted else None for x, wanted in zip((q, c), need, strict=True)
        )
        total = 1 + sum(scoring.prefixes.values())
        parts = [_Prefix(q, c, d, w / total, grads) for d, w in scoring.prefixes.items()]
        # Prefixes nest: the products of a longer one are those of the next shorter one and of the
        # block of components between them, and all gradients of a block come from one product.
        nested = sorted(parts, key=lambda part: part.size)
        ends = [0, *(part.size for part in nested), q.shape[1]]
        blocks = [slice(*pair) for pair in itertools.pairwise(ends)]
        stats = q.new_zeros(len(STATS))
        by_kind = q.new_zeros(2, scoring.kinds[1] if scoring.kinds else 0)
        count = max(1, scoring.tile // len(c))
        for start in range(0, len(q), count):
            rows = slice(start, start + count)
            blocked, own = _mask_rows(mask, rows, len(q[rows]), c), positives[rows, None]
            products = [q[rows, blocks[0]] @ c[:, blocks[0]].T]
            for block in blocks[1:]:
                products.append(torch.addmm(products[-1], q[rows, block], c[:, block].T))
            temperature = scoring.temperature_of(rows, q)
            slope, sums = _score(products.pop(), own, blocked, temperature, scoring.margin)
            stats += sums.sum(1)
            by_kind += scoring.by_kind(rows, sums)
            if parts:
                slope /= total
            for block in reversed(blocks):
                if grads[0] is not None:
                    grads[0][rows, block].addmm_(slope, c[:, block])
                if grads[1] is not None:
                    grads[1][:, block].addmm_(slope.T, q[rows, block])
                if products:
                    part = nested[len(products) - 1]
                    slope += part.slope(products.pop(), rows, own, blocked, temperature)
        loss = stats[0] / total
        for part in parts:
            loss = loss + part.weight * part.stats[0]
            part.finish()
        ctx.grads, ctx.dtypes = grads, (queries.dtype, candidates.dtype)
        every = torch.cat([stats, *(part.stats for part in parts), by_kind.flatten()])
        ctx.mark_non_differentiable(every)
        return loss.clone(), every

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = zip(ctx.grads, ctx.dtypes, strict=True), None  # scaled in place, so once
        scaled = (None if g is None else g.mul_(slope).to(dtype) for g, dtype in grads)
        return (*scaled, None, None, None)


class _Prefix:
    """The loss of the first `size` components of all vectors, and its gradients.

    With s = 1 / |x[:d]|, a prefix of unit length is s x[:d]; if g is the gradient with respect to
    it, that of x[:d] is s (g - (g . s x[:d]) s x[:d]). The products g . s x[:d] are sums of slope
    times cosine, over a row for a query and over a column for a candidate: that part is added to
    the gradients here, and `slope` returns the factors of the other vectors.
    """

    def __init__(
        self, q: Tensor, c: Tensor, size: int, weight: float, grads: tuple[Tensor | None, ...]
    ) -> None:
        self.size, self.weight = size, weight
        self.q, self.c = q[:, :size], c[:, :size]
        self.grads = [None if grad is None else grad[:, :size] for grad in grads]
        # As torch.nn.functional.normalize does, a vector of zeros has the scale 1e12.
        self.q_scale = self.q.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
        self.c_scale = self.c.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
        self.along = torch.zeros_like(self.c_scale)  # g . s x[:d] of each candidate so far
        self.stats = q.new_zeros(2)

    def slope(
        self,
        products: Tensor,
        rows: slice,
        own: Tensor,
        blocked: Tensor,
        temperature: float | Tensor,
    ) -> Tensor:
        """Return d loss / d products of one tile of queries, (rows, C).

        products: q[rows, :d] @ c[:, :d].T, written over.
        """
        q_scale = self.q_scale[rows]
        cosines = products.mul_(q_scale).mul_(self.c_scale.T)
        masked = cosines.masked_fill(blocked, float("-inf"))
        slope, losses, right = _slope(masked, own, temperature, self.weight)
        self.stats += torch.stack([losses.sum(), right.sum().to(losses.dtype)])
        cosines *= slope
        if self.grads[0] is not None:
            along = cosines.sum(1, keepdim=True) * q_scale.square()
            self.grads[0][rows].addcmul_(along, self.q[rows], value=-1)
        if self.grads[1] is not None:
            self.along += cosines.sum(0)[:, None]
        return slope.mul_(q_scale).mul_(self.c_scale.T)

    def finish(self) -> None:
        """Add what is left of the candidates' gradients, after the last tile."""
        if self.grads[1] is not None:
            self.grads[1].addcmul_(self.along * self.c_scale.square(), self.c, value=-1)


def _mask_rows(mask: Mask | None, rows: slice, count: int, candidates: Tensor) -> Tensor:
    """Return the mask of these rows, (count, C) bool, as a tensor that may be written to."""
    if mask is None:
        return candidates.new_zeros(count, len(candidates), dtype=torch.bool)
    return mask[rows].clone() if isinstance(mask, Tensor) else mask(rows)


def _score(
    cosines: Tensor,
    own: Tensor,
    blocked: Tensor,
    temperature: float | Tensor,
    margin: float | None,
) -> tuple[Tensor, Tensor]:
    """Return one tile's (d loss / d cosines (rows, C), STATS of each row (5, rows)).

    cosines (rows, C): the result is written over them. own (rows, 1): each query's positive.
    blocked (rows, C): is written to. temperature: a number, or (rows, 1).
    """
    positive = cosines.gather(1, own)
    if margin is not None:
        blocked |= cosines > positive + margin
    blocked.scatter_(1, own, False)
    # The own positive is no negative; the candidates beside it that are not masked are.
    left = cosines.shape[1] - 1 - blocked.sum(1)
    count = left.clamp_min(1)
    negative = (cosines.masked_fill_(blocked, 0.0).sum(1) - positive[:, 0]) / count
    masked = cosines.masked_fill_(blocked, float("-inf"))
    slope, losses, right = _slope(masked, own, temperature)
    rows = [losses, right, positive[:, 0], negative, left == 0]
    return slope, torch.stack([row.to(losses.dtype) for row in rows])


def _slope(
    cosines: Tensor, own: Tensor, temperature: float | Tensor, weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weight * d loss / d cosines (rows, C), losses (rows,), accuracy (rows,) bool).

    cosines (rows, C): -inf where masked; the result is written over them.
    """
    scores = cosines.div_(temperature)
    positive = scores.gather(1, own)
    top, place = scores.max(1, keepdim=True)
    odds = scores.sub_(top).exp_()
    total = odds.sum(1, keepdim=True)
    losses = total.log() + top - positive
    # d loss / d scores = softmax - one_hot.
    slope = odds.mul_(weight / (total * temperature))
    slope.scatter_add_(1, own, torch.full_like(positive, -weight) / temperature)
    return slope, losses[:, 0], (place == own)[:, 0]
