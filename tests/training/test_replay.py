"""Stage 2 with `stage2.generative`: both losses in one step, on real ranks under ZeRO-1, 2 and 3.

Oracle: each loss computed apart in plain torch, every text alone.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lbr_ds import lineage
from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.runs import checkpoints
from lbr_ds.training.checkpoint.resume import find_checkpoint
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe
from tests.training.replayed import BAG, CASES, WEIGHT
from tests.training.test_resume import metrics
from tests.training.test_stages import contrastive_oracle, distance, generative_oracle

pytestmark = pytest.mark.slow

WORLDS = (1, 2)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("replay")
    run = load(tiny_recipe(folder, group_every=20), ["stage1.samples_per_step=12"])
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    (run.run / "recipe.yaml").write_text(run.dump())
    for stage in (1, 2, 3):
        zero = {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
        text = json.dumps({"zero_optimization": zero})
        (run.run / f"zero{stage}.json").write_text(text)
    for world in WORLDS:
        run_ranks("tests.training.replayed", world, str(run.run / "recipe.yaml"), str(run.run))
    return run


def probed(run: RunConfig, case: str, world: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run.run / f"{case}-{world}.pt")
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_step_is_the_sum_of_both_losses(run: RunConfig, case: str, world: int) -> None:
    generative, bag, of_generative = generative_oracle(run, BAG)
    contrastive, of_contrastive = contrastive_oracle(run)
    found = probed(run, case, world)
    wanted = {name: WEIGHT * grad for name, grad in of_generative.items()}
    for name, grad in of_contrastive.items():
        wanted[name] = wanted[name] + grad
    assert distance(found["grads"], wanted) <= TOLERANCE
    assert distance(found["grads"], of_contrastive) > 0.01
    assert (min(found["micro_batches"]) > 1) == case.endswith("cached")
    stats = found["stats"]
    assert stats["loss"] == pytest.approx(contrastive, rel=TOLERANCE)
    assert stats["generative_loss"] == pytest.approx(generative, rel=TOLERANCE)
    assert stats["bag_loss"] == pytest.approx(bag, rel=TOLERANCE)


@pytest.mark.parametrize("world", WORLDS)
def test_resumed_bit_for_bit(run: RunConfig, world: int) -> None:
    whole, resumed = (run.run / f"{name}-{world}" / "stage2" for name in ("whole", "resumed"))
    found = metrics(whole)
    assert len(found) == 4
    assert len({row["generative_loss"] for row in found}) == 4
    assert found == metrics(resumed)
    saved = [checkpoints(folder)[-1] / "model/model.safetensors" for folder in (whole, resumed)]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    made = lineage.load(saved[0].parent)
    assert made is not None
    assert [(one.split, one.replayed) for one in made.history] == [("cl", "gl")]


def test_ranks_see_the_same(run: RunConfig) -> None:
    one, two = (metrics(run.run / f"whole-{world}" / "stage2") for world in WORLDS)
    for ours, theirs in zip(one, two, strict=True):
        for key in ("loss", "generative_loss", "target_tokens", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_what_is_replayed_decides_the_result(run: RunConfig) -> None:
    """A resume with another batch of stage 1 is refused; other micro-batches of stage 1 are not."""
    recipe, keys = run.run / "recipe.yaml", ["stage2.from=backbone", "stage2.generative=0.5"]
    keys += [f"run={run.run / 'whole-1'}"]
    same = load(recipe, [*keys, "stage1.micro_batch_tokens=64", "stage1.num_steps=99"])
    assert find_checkpoint(same, 2, World()) is not None
    other = load(recipe, [*keys, "stage1.samples_per_step=4"])
    with pytest.raises(CheckpointError, match=r"stage1\.samples_per_step: 12 -> 4"):
        find_checkpoint(other, 2, World())
