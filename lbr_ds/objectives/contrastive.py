"""InfoNCE over candidates of all ranks (paper, section 3.3, equation 3), a tile of rows at a time.

Inputs: this rank's n queries (n, D) and n*(1+M) candidates, unit length. The candidates are
gathered with gradient, C = size*n*(1+M) of them; each rank scores only its own queries. Averaging
over ranks is then right with no further factor (open_clip #616).

A candidate is no negative of a query when it is
  - a positive of a record of the same `group`, on whatever rank, or
  - the text of any of the query's own positives, whoever brought it, or
  - a stand-in for a hard negative that the record did not have, or
  - with a margin: nearer to the query than its own positive by more than the margin. Most such
    candidates are answers that nobody labelled. Qwen3-Embedding (arXiv 2506.05176, section 3) drops
    above positive + 0.1; a margin below 0 also drops what comes close from below, as the absolute
    margin of NV-Retriever (arXiv 2407.15831) does. The cosines are the model's own of this step and
    the choice has no gradient.
A mined hard negative is a negative for every query but those.

The (n, C) scores would outgrow the model long before the model's own memory does, so neither they
nor the mask ever exist whole: a tile of rows is scored, its loss added up and its gradients made,
and the next one takes its place. Memory beyond the gradients is O(tile), time is that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbr_ds.batching.contrastive import Pairs
from lbr_ds.distributed import World

TILE = 1 << 20  # scores in one tile: 4 MiB of fp32
STATS = ("loss", "accuracy", "positive_cosine", "negative_cosine", "no_negatives")


@dataclass(frozen=True)
class Rules:
    """Which of C candidates are negatives of n queries, told by hashes; see Pairs.

    group (n,), known (n, P), own (n,): the query's group, all its positives, and which candidate is
    its own. groups, texts (C,): the candidate's group (-1: none) and text. real (C,) bool.
    """

    group: Tensor
    known: Tensor
    own: Tensor
    groups: Tensor
    texts: Tensor
    real: Tensor

    @classmethod
    def of(cls, pairs: Pairs, world: World) -> Rules:
        """This rank's queries against the candidates of all ranks."""
        n, per_rank, device = pairs.num_queries, len(pairs.text), world.device
        # Only a positive speaks for its record's group; a mined negative belongs to none.
        group = torch.full((per_rank,), -1, dtype=torch.int64)
        group[:n] = pairs.group
        told = torch.stack([group, pairs.text, pairs.real.long()]).T
        groups, texts, real = world.gather(told.to(device)).T.contiguous()
        own = world.rank * per_rank + torch.arange(n, device=device)
        return cls(pairs.group.to(device), pairs.known.to(device), own, groups, texts, real.bool())

    def blocked(self, rows: slice) -> Tensor:
        """(rows, C) bool: candidates that are no negatives; a query's own positive never is."""
        blocked = self.group[rows, None] == self.groups
        blocked |= ~self.real
        for column in self.known[rows].T:
            blocked |= column[:, None] == self.texts
        return blocked.scatter_(1, self.own[rows, None], False)


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    pairs: Pairs,
    temperature: float,
    world: World,
    margin: float | None = None,
    tile: int = TILE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(this rank's sum of losses / queries of all ranks, stats as sums over this rank's queries).

    Computed in fp32, or in the vectors' own dtype where that is wider. margin: a cosine; None drops
    nothing for being near. tile: scores held at a time (at least one row).
    stats: `loss`, `accuracy` (own positive scored highest), `positive_cosine`, `negative_cosine`
    (mean over the allowed negatives), `no_negatives` (queries that have none).
    """
    everyone = world.gather(candidates)  # (C, D)
    rules = Rules.of(pairs, world)
    loss, stats = _InfoNCE.apply(queries, everyone, rules, temperature, margin, tile)
    return loss / (len(queries) * world.size), dict(zip(STATS, stats, strict=True))


class _InfoNCE(torch.autograd.Function):
    """Sum of the queries' losses, and the stats; the gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        candidates: Tensor,
        rules: Rules,
        temperature: float,
        margin: float | None,
        tile: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        q, c = queries.to(dtype), candidates.to(dtype)
        want = ctx.needs_input_grad[:2]
        grads = (torch.empty_like(q) if want[0] else None, torch.zeros_like(c) if want[1] else None)
        stats = q.new_zeros(len(STATS))
        count = max(1, tile // len(c))
        for start in range(0, len(q), count):
            rows = slice(start, start + count)
            slope, found = _score(q[rows], c, rules, rows, temperature, margin)
            stats += found
            if grads[0] is not None:
                torch.mm(slope, c, out=grads[0][rows])
            if grads[1] is not None:
                grads[1].addmm_(slope.T, q[rows])
        ctx.grads, ctx.dtypes = grads, (queries.dtype, candidates.dtype)
        ctx.mark_non_differentiable(stats)
        return stats[0].clone(), stats

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.grads = zip(ctx.grads, ctx.dtypes, strict=True), None  # scaled in place, so once
        grads = (None if g is None else g.mul_(slope).to(dtype) for g, dtype in made)
        return (*grads, None, None, None, None)


def _score(
    q: Tensor, c: Tensor, rules: Rules, rows: slice, temperature: float, margin: float | None
) -> tuple[Tensor, Tensor]:
    """One tile: (d loss / d cosines (rows, C), the stats as sums over the rows)."""
    cosines = q @ c.T
    own = rules.own[rows, None]
    positive = cosines.gather(1, own)
    blocked = rules.blocked(rows)
    if margin is not None:
        blocked |= cosines > positive + margin
        blocked.scatter_(1, own, False)
    # The own positive is no negative; what is left after it and the blocked ones is counted.
    left = c.shape[0] - 1 - blocked.sum(1)
    count = left.clamp_min(1)
    negative = (cosines.masked_fill_(blocked, 0.0).sum(1) - positive[:, 0]) / count
    scores = cosines.masked_fill_(blocked, float("-inf")).div_(temperature)
    right = (scores.argmax(1) == own[:, 0]).sum()
    total = scores.logsumexp(1, keepdim=True)
    losses = total - scores.gather(1, own)
    # d loss / d scores = softmax - one_hot, written over the scores.
    slope = scores.sub_(total).exp_()
    slope.scatter_add_(1, own, torch.full_like(positive, -1.0))
    sums = [losses.sum(), right, positive.sum(), negative.sum(), (left == 0).sum()]
    stats = torch.stack([number.to(q.dtype) for number in sums])
    return slope.div_(temperature), stats
