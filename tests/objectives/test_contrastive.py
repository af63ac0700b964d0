"""What InfoNCE counts as a negative: the rule as a truth table over one small step."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from lbr_ds.batching.contrastive import Pairs, hashed
from lbr_ds.distributed import World
from lbr_ds.objectives.contrastive import blocked_pairs, info_nce

# Query i answers candidate i; candidates 4..7 are mined negatives, one a query.
GROUPS = ["a", "a", "b", "c"]
POSITIVES = [["p0"], ["p1"], ["p2", "p0"], ["p3"]]  # p0 also answers query 2
NEGATIVES = ["n0", "p2", "n2", None]  # query 1 mined what answers query 2; query 3 has none
BLOCKED = [
    # p0 p1 p2 p3   n0 p2 n2 -
    [0, 1, 0, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 0, 0, 1],
    [1, 0, 0, 0, 0, 1, 0, 1],
    [0, 0, 0, 0, 0, 0, 0, 1],
]


def pairs() -> Pairs:
    texts = [p[0] for p in POSITIVES] + [n or "p3" for n in NEGATIVES]
    known = [[hashed(p) for p in ps] + [-1] * (2 - len(ps)) for ps in POSITIVES]
    return Pairs(
        sequences=[], group=torch.tensor([hashed(g) for g in GROUPS]), known=torch.tensor(known),
        text=torch.tensor([hashed(t) for t in texts]),
        real=torch.tensor([True] * 4 + [n is not None for n in NEGATIVES]),
    )  # fmt: skip


def test_truth_table() -> None:
    blocked, own = blocked_pairs(pairs(), World())
    assert own.tolist() == [0, 1, 2, 3]
    assert blocked.int().tolist() == BLOCKED


def test_loss_and_stats_equal_plain_python() -> None:
    torch.manual_seed(0)
    queries, candidates = normalize(torch.randn(4, 6)), normalize(torch.randn(8, 6))
    loss, stats = info_nce(queries, candidates, pairs(), 0.1, World())
    losses, right, negative = [], 0, []
    for i in range(4):
        allowed = [j for j in range(8) if not BLOCKED[i][j]]
        cosines = {j: float(queries[i] @ candidates[j]) for j in allowed}
        total = sum(torch.tensor(c / 0.1).exp() for c in cosines.values())
        losses.append(float(total.log()) - cosines[i] / 0.1)
        right += cosines[i] == max(cosines.values())
        others = [c for j, c in cosines.items() if j != i]
        negative.append(sum(others) / len(others))
    assert torch.isclose(loss, torch.tensor(sum(losses) / 4))
    assert stats["accuracy"].item() == right
    assert torch.isclose(stats["negative_cosine"], torch.tensor(sum(negative)))
