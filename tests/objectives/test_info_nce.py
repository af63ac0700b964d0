"""What InfoNCE counts as a negative, as a truth table; and its tiles against the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from lbr_ds.batching.contrastive import Pairs, hashed
from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.distributed import World
from lbr_ds.objectives import info_nce as room
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.objectives.info_nce import Mask, info_nce
from lbr_ds.plan import memory
from lbr_ds.training.stages import contrastive_loss

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
        sequences=[],
        group=torch.tensor([hashed(g) for g in GROUPS]),
        known=torch.tensor(known),
        text=torch.tensor([hashed(t) for t in texts]),
        real=torch.tensor([True] * 4 + [n is not None for n in NEGATIVES]),
    )


def mask_of(step: Pairs) -> FalseNegatives:
    groups, texts, real = step.candidate_labels().T
    return FalseNegatives(step.group, step.known, groups, texts, real > 0)


def test_truth_table() -> None:
    mask = mask_of(pairs())
    whole = mask(slice(0, 4))
    assert whole.diagonal().all()  # a query's own positive, which info_nce never masks
    assert whole.fill_diagonal_(False).int().tolist() == BLOCKED
    assert mask(slice(1, 3))[:, [0, 3]].int().tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("whole", [True, False], ids=["tensor", "function"])
def test_a_mask_is_a_tensor_or_a_function_and_positives_are_anywhere(whole: bool) -> None:
    """The candidates in another order, the positives named; a tensor is left as it is."""
    torch.manual_seed(0)
    queries, candidates = normalize(torch.randn(4, 6)), normalize(torch.randn(8, 6))
    wanted, stats = info_nce(
        queries, candidates, temperature=0.1, mask=torch.tensor(BLOCKED).bool()
    )
    order = torch.tensor([5, 3, 0, 7, 1, 6, 2, 4])
    table = torch.tensor(BLOCKED).bool()[:, order]
    mask: Mask = table if whole else lambda rows: table[rows].clone()
    before = table.clone()
    loss, found = info_nce(
        queries,
        candidates[order],
        temperature=0.1,
        positives=order.argsort()[:4],
        mask=mask,
        tile=10,
    )
    assert torch.equal(table, before)
    torch.testing.assert_close(loss, wanted)
    for name, value in stats.items():
        torch.testing.assert_close(found[name], value)


def test_loss_and_stats_equal_plain_python() -> None:
    torch.manual_seed(0)
    queries, candidates = normalize(torch.randn(4, 6)), normalize(torch.randn(8, 6))
    loss, stats = contrastive_loss(
        torch.cat([queries, candidates]), pairs(), World(), temperature=0.1
    )
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


def dense(
    queries: Tensor, candidates: Tensor, pairs: Pairs, temperature: float, margin: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: scores and mask whole, gradients by autograd, the margin outside the graph."""
    n = len(queries)
    rows = torch.arange(n)
    positives_group = torch.full((len(candidates),), -1)
    positives_group[:n] = pairs.group
    blocked = ~pairs.real[None, :] | (pairs.group[:, None] == positives_group)
    blocked |= (pairs.known[:, :, None] == pairs.text).any(1)
    cosines = queries @ candidates.T
    if margin is not None:
        blocked |= cosines.detach() > cosines.detach()[rows, rows][:, None] + margin
    blocked[rows, rows] = False
    scores = (cosines / temperature).masked_fill(blocked, float("-inf"))
    losses = cross_entropy(scores, rows, reduction="none")
    negative = ~blocked
    negative[rows, rows] = False
    mean = (cosines * negative).sum(1) / negative.sum(1).clamp_min(1)
    stats = {
        "loss": losses.sum(),
        "accuracy": (scores.argmax(1) == rows).sum(),
        "positive_cosine": cosines[rows, rows].sum(),
        "negative_cosine": mean.sum(),
        "no_negatives": (negative.sum(1) == 0).sum(),
    }
    return losses.sum() / n, stats


def made_up(n: int, negatives: int) -> Pairs:
    """Hashes with groups, shared positives and missing negatives all about."""
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int, high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    text = draw(n * (1 + negatives), high=2 * n)
    known = torch.stack([text[:n], draw(n, high=2 * n), torch.full((n,), -1)]).T
    real = torch.cat([torch.ones(n), draw(n * negatives, high=4)]) > 0
    return Pairs([], draw(n, high=n), known, text, real)


@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("margin", [None, 0.1, 0.0, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_equal_the_whole_matrix(
    tile: int, negatives: int, margin: float | None, dtype: torch.dtype
) -> None:
    n, step = 13, made_up(13, negatives)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(n * (2 + negatives), 8, generator=generator, dtype=dtype)
    found = []
    for objective in ("tiled", "dense"):
        x = normalize(vectors, dim=-1).requires_grad_()
        if objective == "tiled":
            loss, stats = info_nce(
                x[:n], x[n:], temperature=0.05, mask=mask_of(step), margin=margin, tile=tile
            )
            stats = {name: value * n for name, value in stats.items()}
        else:
            loss, stats = dense(x[:n], x[n:], step, 0.05, margin)
        (slope,) = torch.autograd.grad(3.0 * loss, x)
        found.append((loss.detach(), slope, *(stats[name].to(dtype) for name in sorted(stats))))
    near = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


def test_the_margin_drops_what_is_nearer_than_the_positive() -> None:
    """One query along x; its positive at cosine 0.6, the others at 0.8 and 0.65."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    x = torch.tensor([0.6, 0.8, 0.65])
    candidates = torch.stack([x, (1 - x * x).sqrt()], 1)
    step = Pairs([], torch.arange(3), torch.arange(3)[:, None], torch.arange(3), torch.ones(3) > 0)

    def loss(margin: float | None) -> float:
        options = {"temperature": 1.0, "mask": mask_of(step), "margin": margin}
        return float(info_nce(queries, candidates, **options, reduction="sum")[0])

    def by_hand(*kept: list[float]) -> float:
        return sum(float(torch.tensor(row).logsumexp(0)) - row[0] for row in kept)

    y = (1 - x * x).sqrt().tolist()
    rest = ([y[1], y[0], y[2]], [y[2], y[0], y[1]])
    assert loss(None) == pytest.approx(by_hand([0.6, 0.8, 0.65], *rest), abs=1e-6)
    # Row 0 drops 0.8 > 0.6 + 0.1; row 1 (own 0.6) drops 0.8 and 0.76; row 2 (own 0.76) drops none.
    assert loss(0.1) == pytest.approx(by_hand([0.6, 0.65], [y[1]], rest[1]), abs=1e-6)


def test_vectors_in_half_precision_are_scored_in_fp32() -> None:
    torch.manual_seed(0)
    x = normalize(torch.randn(39, 8), dim=-1).bfloat16()
    mask = mask_of(made_up(13, 1))
    loss, _ = info_nce(x[:13], x[13:], temperature=0.05, mask=mask)
    wanted, _ = info_nce(x[:13].float(), x[13:].float(), temperature=0.05, mask=mask)
    assert loss.dtype == torch.float32
    assert loss == wanted


@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
@pytest.mark.parametrize("margin", [None, -0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefixes_equal_autograd(tile: int, margin: float | None, dtype: torch.dtype) -> None:
    """The weighted mean over prefixes of unit length; negatives as the whole vectors decide."""
    n, step, weights = 13, made_up(13, 2), {5: 0.5, 2: 2.0}
    vectors = torch.randn(n * 4, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    vectors[3, :2] = 0  # a prefix of zeros has no direction
    mask = mask_of(step)(slice(0, n))
    x = normalize(vectors, dim=-1).requires_grad_()
    options: dict[str, Any] = {"temperature": 0.05, "margin": margin, "prefixes": weights}
    loss, stats = info_nce(x[:n], x[n:], mask=mask, tile=tile, **options)
    (slope,) = torch.autograd.grad(3.0 * loss, x)

    cosines = (x[:n] @ x[n:].T).detach()
    if margin is not None:
        mask = mask | (cosines > cosines.diagonal()[:, None] + margin)
    mask = mask & ~torch.eye(n, len(x) - n, dtype=torch.bool)
    total = torch.zeros((), dtype=dtype)
    for size, weight in {8: 1.0, **weights}.items():
        part = x if size == 8 else normalize(x[:, :size], dim=-1)
        scores = (part[:n] @ part[n:].T / 0.05).masked_fill(mask, float("-inf"))
        one = cross_entropy(scores, torch.arange(n))
        total = total + weight * one
        name = "" if size == 8 else f"_{size}"
        right = (scores.argmax(1) == torch.arange(n)).to(dtype).mean()
        torch.testing.assert_close(stats[f"loss{name}"], one.detach())
        torch.testing.assert_close(stats[f"accuracy{name}"], right)
    (wanted,) = torch.autograd.grad(3.0 * total / 3.5, x)
    near = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(loss, total / 3.5, rtol=near, atol=near)
    # Nothing to compare where a prefix is zero: its direction has no derivative.
    rows = [i for i in range(len(x)) if i != 3]
    torch.testing.assert_close(slope[rows], wanted[rows], rtol=near, atol=10 * near)


def test_prefixes_hold_no_further_copy_of_the_vectors() -> None:
    """A few tiles and numbers per candidate, whatever the lengths; no truncated copy."""
    n, width = 256, 512
    drawn = torch.randn(2, n, width, generator=torch.Generator().manual_seed(0))
    queries, candidates = normalize(drawn, dim=-1).requires_grad_()

    def peak(prefixes: dict[int, float]) -> int:
        return peak_bytes(
            lambda: info_nce(queries, candidates, temperature=0.05, tile=4 * n, prefixes=prefixes)
        )

    copy_of_the_shortest = 4 * n * 64
    assert peak({256: 1.0, 128: 1.0, 64: 1.0}) - peak({}) < copy_of_the_shortest


def test_a_tile_has_rows_enough_however_many_candidates_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one row a tile, a batch would read all candidates once for each of its queries."""
    monkeypatch.setattr(room, "TILE", 16)
    calls: list[slice] = []

    def mask(rows: slice) -> Tensor:
        calls.append(rows)
        return torch.zeros(len(range(70)[rows]), 70, dtype=torch.bool)

    vectors = normalize(torch.randn(70, 4), dim=-1)
    room.info_nce(vectors, vectors, temperature=0.1, mask=mask)
    assert [len(range(70)[rows]) for rows in calls] == [room.MIN_ROWS, room.MIN_ROWS, 6]


def test_the_planner_knows_the_tile() -> None:
    assert (memory._TILE, memory._TILE_ROWS) == (room.TILE, room.MIN_ROWS)


@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
@pytest.mark.parametrize("weights", [{}, {5: 0.5, 2: 2.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_query_with_its_temperature_equals_autograd(
    tile: int, weights: dict[int, float], dtype: torch.dtype
) -> None:
    """And the sums by kind are those of its queries; a query of kind -1 is in none."""
    n, step = 13, made_up(13, 2)
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(n * 4, 8, generator=generator, dtype=dtype)
    temperature = torch.rand(n, generator=generator, dtype=torch.float64) + 0.05
    kind = torch.tensor([0, 2, -1] + [0, 2] * 5)
    mask = mask_of(step)(slice(0, n))
    x = normalize(vectors, dim=-1).requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "prefixes": weights, "kinds": (kind, 3)}
    loss, stats = info_nce(x[:n], x[n:], mask=mask, tile=tile, reduction="sum", **options)
    (slope,) = torch.autograd.grad(3.0 * loss, x)

    blocked = mask & ~torch.eye(n, len(x) - n, dtype=torch.bool)
    total, share = torch.zeros((), dtype=dtype), 1 + sum(weights.values())
    for size, weight in {8: 1.0, **weights}.items():
        part = x if size == 8 else normalize(x[:, :size], dim=-1)
        scores = part[:n] @ part[n:].T / temperature[:, None].to(dtype)
        scores = scores.masked_fill(blocked, float("-inf"))
        losses = cross_entropy(scores, torch.arange(n), reduction="none")
        total = total + weight / share * losses.sum()
        if size == 8:
            right = scores.argmax(1) == torch.arange(n)
            for number in range(3):
                own = kind == number
                torch.testing.assert_close(stats[f"loss/{number}"], losses[own].sum().detach())
                assert stats[f"accuracy/{number}"] == right[own].sum()
    (wanted,) = torch.autograd.grad(3.0 * total, x)
    near = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(loss, total, rtol=near, atol=near)
    torch.testing.assert_close(slope, wanted, rtol=near, atol=10 * near)
    by_kind = sum(stats[f"loss/{number}"] for number in range(3))
    assert by_kind < stats["loss"]
