"""A teacher's loss beside InfoNCE equals plain torch in fp64, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lbr_ds.config import DistillationConfig, load
from lbr_ds.distributed import World
from lbr_ds.errors import ConfigError
from lbr_ds.training.stages import contrastive_loss
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe
from tests.training.distilled import CASES, LOSSES, M, N, config, found, oracle, share
from tests.training.reads import count

RANKS = 2


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    """What each of two real ranks has found."""
    folder = tmp_path_factory.mktemp("distilled")
    run_ranks("tests.training.distilled", RANKS, str(folder))
    return [torch.load(folder / f"{rank}-of-{RANKS}.pt") for rank in range(RANKS)]


def check(gradient: Tensor, stats: dict[str, float], case: tuple[str, str, str]) -> None:
    wanted, told, counted = oracle(*case)
    assert 0 < counted < N
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert stats["distilled"] == counted
    assert stats["distillation_loss"] == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("cached", [False, True], ids=["at once", "cached"])
def test_one_rank_equals_plain_torch(case: tuple[str, str, str], cached: bool) -> None:
    made = found(World(), *case, cached=cached)
    check(made["gradient"], made["stats"], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("cached", [False, True], ids=["at once", "cached"])
def test_two_ranks_equal_plain_torch(
    shares: list[dict[Any, dict[str, Any]]], case: tuple[str, str, str], cached: bool
) -> None:
    """DeepSpeed averages gradients over ranks, so each rank's are those of its part times two."""
    parts = [made[case, cached] for made in shares]
    size = N // RANKS
    cuts = [part["gradient"].split([size, size, size * M]) for part in parts]
    gradient = torch.cat([torch.cat(kind) for kind in zip(*cuts, strict=True)]) / RANKS
    stats = {name: sum(p["stats"][name] for p in parts) for name in parts[0]["stats"]}
    check(gradient, stats, case)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_read_from_the_device(loss: str) -> None:
    raw, pairs = share(World())

    def act() -> None:
        value, _ = contrastive_loss(
            raw.requires_grad_(),
            pairs,
            World(),
            temperature=0.1,
            prefixes={4: 1.0},
            distillation=config(loss, "added"),
        )
        value.backward()

    assert count(act) == []


def test_temperatures() -> None:
    """Logits of a teacher are taken as they are; its cosines are treated as the student's are."""
    made = {
        loss: DistillationConfig(loss=loss).temperatures(0.03)
        for loss in ("kl", "margin_mse", "batch_kl")
    }
    assert made == {"kl": (0.03, 1.0), "margin_mse": (0.03, 1.0), "batch_kl": (0.03, 0.03)}
    given = DistillationConfig(loss="batch_kl", temperature=0.5, teacher_temperature=2.0)
    assert given.temperatures(0.03) == (0.5, 2.0)


def test_scores_need_hard_negatives(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, prepared=False)
    overrides = ["stage2.num_negatives=0", "stage2.distillation.loss=kl"]
    with pytest.raises(ConfigError, match=r"num_negatives is 0; raise num_negatives"):
        load(recipe, overrides)
    assert load(recipe, [overrides[0], "stage2.distillation.loss=batch_kl"])
