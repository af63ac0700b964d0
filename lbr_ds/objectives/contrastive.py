"""InfoNCE over candidates of all ranks (paper, section 3.3, equation 3).

Inputs: this rank's n queries (n, D) and n*(1+M) candidates, unit length. The candidates are
gathered with gradient, C = size*n*(1+M) of them; each rank scores only its own queries. Averaging
over ranks is then right with no further factor (open_clip #616).

A candidate is no negative of a query when it is
  - a positive of a record of the same `group`, on whatever rank, or
  - the text of any of the query's own positives, whoever brought it, or
  - a stand-in for a hard negative that the record did not have.
A mined hard negative is a negative for every query but those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lbr_ds.batching.contrastive import Pairs
from lbr_ds.distributed import World


def info_nce(
    queries: Tensor, candidates: Tensor, pairs: Pairs, temperature: float, world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    """(this rank's sum of losses / queries of all ranks, stats as sums over this rank's queries).

    stats: `loss`, `accuracy` (own positive scored highest), `positive_cosine`, `negative_cosine`
    (mean over the allowed negatives).
    """
    n, per_rank = len(queries), len(candidates)
    everyone = world.gather(candidates)  # (C, D)
    blocked, own = blocked_pairs(pairs, world)
    blocked, own = blocked.to(queries.device), own.to(queries.device)
    cosines = queries @ everyone.T  # (n, C)
    scores = (cosines / temperature).masked_fill(blocked, float("-inf"))
    losses = cross_entropy(scores, own, reduction="none")
    assert everyone.shape[0] == world.size * per_rank
    with torch.no_grad():
        positive = cosines.gather(1, own[:, None])[:, 0]
        negative = ~blocked
        negative[torch.arange(n, device=negative.device), own] = False
        count = negative.sum(1).clamp_min(1)
        stats = {
            "loss": losses.sum(),
            "accuracy": (scores.argmax(1) == own).float().sum(),
            "positive_cosine": positive.sum(),
            "negative_cosine": ((cosines * negative).sum(1) / count).sum(),
        }
    return losses.sum() / (n * world.size), stats


def blocked_pairs(pairs: Pairs, world: World) -> tuple[Tensor, Tensor]:
    """(n, C) bool: candidates that are no negatives of a query; (n,) int64: its own positive.

    The own positive is never blocked.
    """
    n, per_rank = pairs.num_queries, len(pairs.text)
    # Only a positive speaks for its record's group; a mined negative belongs to none.
    group = torch.full((per_rank,), -1, dtype=torch.int64)
    group[:n] = pairs.group
    told = torch.stack([group, pairs.text, pairs.real.long()]).T
    groups, texts, real = world.gather(told.to(world.device)).cpu().T
    blocked = (real == 0)[None, :] | (pairs.group[:, None] == groups[None, :])
    for column in pairs.known.T:
        blocked |= column[:, None] == texts[None, :]
    own = world.rank * per_rank + torch.arange(n)
    blocked[torch.arange(n), own] = False
    return blocked, own
