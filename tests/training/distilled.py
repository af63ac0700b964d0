"""Stage 2's loss with a teacher, in fp64: gathered over ranks, and the same in plain torch.

`python -m tests.training.distilled OUT`: rank 0 writes OUT/WORLD.pt, the gradients of each case.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from lbr_ds.batching.contrastive import Pairs
from lbr_ds.config import DistillationConfig
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.objectives.gradient_caching import vector_gradients
from lbr_ds.training.stages import contrastive_loss

N, M, D, E, TAU = 8, 2, 10, 7, 0.1
LOSSES = ("kl", "margin_mse", "batch_kl", "batch_cosine")
PREFIXES: dict[str, dict[int, float]] = {"whole": {}, "prefixes": {6: 0.5, 3: 2.0}}
WEIGHTS = {"added": (0.7, 1.5), "alone": (2.0, 0.0)}  # of the teacher, of InfoNCE
CASES = [(loss, cut, both) for loss in LOSSES for cut in PREFIXES for both in WEIGHTS]


def config(loss: str, both: str) -> DistillationConfig:
    weight, info_nce = WEIGHTS[both]
    raw = {"loss": loss, "weight": weight, "info_nce": info_nce}
    return DistillationConfig.model_validate(
        {**raw, "temperature": 0.2, "teacher_temperature": 0.5}
    )


def step() -> tuple[Tensor, Pairs]:
    """Vectors before they are scaled to unit length, (N + N (1 + M), D), and what goes with them.

    Query 1 has no scores, query 2 one negative, query 3 a score of its positive only; the teacher
    does not know query 4 and candidate 5.
    """
    draw = torch.Generator().manual_seed(5)
    vectors = torch.randn(N * (2 + M), D, generator=draw, dtype=torch.float64)
    real = torch.ones(N * (1 + M), dtype=torch.bool)
    real[N + 2 * M + 1] = False
    scores = 3 * torch.randn(N, 1 + M, generator=draw)
    scores[1], scores[2, 2], scores[3, 1:] = torch.nan, torch.nan, torch.nan
    teacher = normalize(torch.randn(N * (2 + M), E, generator=draw), dim=1).half()
    teacher[4] = teacher[N + 5] = torch.nan
    teacher[N:][~real] = torch.nan
    groups, texts = torch.arange(N) % 6, torch.arange(len(real)) + 100
    return vectors, Pairs([], groups, texts[:N, None], texts, real, scores, teacher)


def share(world: World) -> tuple[Tensor, Pairs]:
    """What one of the ranks has of it."""
    vectors, pairs = step()
    own = torch.arange(N).chunk(world.size)[world.rank]
    mined = torch.cat([N + M * i + torch.arange(M) for i in own.tolist()])
    candidates = torch.cat([own, mined])
    assert pairs.scores is not None
    assert pairs.teacher is not None
    rows = torch.cat([own, N + candidates])
    return vectors[rows], Pairs(
        [],
        pairs.group[own],
        pairs.known[own],
        pairs.text[candidates],
        pairs.real[candidates],
        pairs.scores[own],
        pairs.teacher[rows],
    )


def found(world: World, loss: str, cut: str, both: str, *, cached: bool) -> dict[str, Any]:
    """Loss, gradient of this rank's vectors and stats by the program; cached: in chunks of five."""
    raw, pairs = share(world)
    loss_of = functools.partial(
        contrastive_loss,
        pairs=pairs,
        world=world,
        temperature=TAU,
        prefixes=PREFIXES[cut],
        distillation=config(loss, both),
    )
    if cached:
        chunks = list(torch.arange(len(raw)).split(5))
        unit = normalize(raw, dim=1)
        slopes, stats = vector_gradients(lambda i: unit[chunks[i]], chunks, loss_of)
        grown = raw.requires_grad_()
        (gradient,) = torch.autograd.grad(normalize(grown, dim=1), grown, slopes)
    else:
        value, stats = loss_of(normalize(raw.requires_grad_(), dim=1))
        (gradient,) = torch.autograd.grad(value, raw)
    return {"gradient": gradient, "stats": {name: float(sums) for name, sums in stats.items()}}


def oracle(loss: str, cut: str, both: str) -> tuple[Tensor, float, int]:
    """The gradient of the whole step, and the teacher's loss and queries that count, row by row."""
    raw, pairs = step()
    raw.requires_grad_()
    settings, prefixes = config(loss, both), {D: 1.0, **PREFIXES[cut]}
    assert pairs.scores is not None
    assert pairs.teacher is not None
    teacher = pairs.teacher.double()
    total, told, counted = raw.new_zeros(()), 0.0, 0
    for size, weight in prefixes.items():
        unit = normalize(normalize(raw, dim=1)[:, :size], dim=1)
        q, c = unit[:N], unit[N:]
        for i in range(N):
            keep = [j for j in range(len(c)) if j == i or _negative(pairs, i, j)]
            row = (c[keep] @ q[i] / TAU)[None]
            part = settings.info_nce * cross_entropy(row, torch.tensor([keep.index(i)]))
            own = [i, *(N + M * i + k for k in range(M))]
            taught = _taught(loss, q[i], c, own, pairs.scores[i].double(), teacher[i], teacher[N:])
            if taught is not None:
                part = part + settings.weight * taught
                told += float(taught.detach()) if size == D else 0
                counted += size == D
            total = total + weight / sum(prefixes.values()) * part / N
    (gradient,) = torch.autograd.grad(total, raw)
    return gradient, told, counted


def _negative(pairs: Pairs, i: int, j: int) -> bool:
    same_group = j < N and pairs.group[i] == pairs.group[j]
    return bool(pairs.real[j]) and not same_group


def _taught(
    loss: str, q: Tensor, c: Tensor, own: list[int], scores: Tensor, known: Tensor, others: Tensor
) -> Tensor | None:
    if loss in ("kl", "margin_mse"):
        use = [k for k in range(len(own)) if scores[k].isfinite()]
        if 0 not in use or len(use) < 2:
            return None
        student, teacher = c[[own[k] for k in use]] @ q / 0.2, scores[use] / 0.5
        if loss == "margin_mse":
            margins = (student[0] - student[1:]) - (teacher[0] - teacher[1:])
            return margins.square().mean()
    else:
        if not known.isfinite().all():
            return None
        use = [j for j in range(len(c)) if others[j].isfinite().all()]
        student, teacher = c[use] @ q, others[use] @ known
        if loss == "batch_cosine":
            return 1 - cosine_similarity(student, teacher, dim=0)
        student, teacher = student / 0.2, teacher / 0.5
    p = teacher.softmax(0)
    return (p * (p.log() - student.log_softmax(0))).sum()


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    made = {(case, way): found(place, *case, cached=way) for case in CASES for way in (False, True)}
    torch.save(made, Path(sys.argv[1]) / f"{place.rank}-of-{place.size}.pt")
    leave()
    end(0)
