"""A run that goes on with another number of ranks equals one that kept its own, ZeRO 1, 2 and 3.

Background saves hold what saves on the spot hold.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lbr_ds.runs import fault, saved
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe

ZERO = (1, 2, 3)
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks and six steps, and copies that changed ranks on the way.

    whole-Z: ZeRO stage Z throughout. moved-Z: from its step 2 on four ranks. 3 also: from step 2 on
    one rank, from 4 on two, from 5 on four (`wandered`). at-once: ZeRO 3, saved on the spot.
    """
    folder = tmp_path_factory.mktemp("worlds")
    tiny_recipe(folder)
    for zero in ZERO:
        config: dict[str, Any] = {"stage": zero, "overlap_comm": False}
        if zero == 3:
            config["stage3_param_persistence_threshold"] = 100
        (folder / f"zero{zero}.json").write_text(json.dumps({"zero_optimization": config}))
    take(2, 6, *(arguments(folder, f"whole-{z}", z) for z in ZERO),
         arguments(folder, "at-once", 3, "every.save_async=false"))  # fmt: skip
    for name, zero in [*((f"moved-{z}", z) for z in ZERO), ("wandered", 3)]:
        for place in ("backbone", "stage1/checkpoints/step-000002"):
            shutil.copytree(folder / f"whole-{zero}" / place, folder / name / place)
    take(1, 4, arguments(folder, "wandered", 3))
    take(2, 5, arguments(folder, "wandered", 3))
    take(4, 6, *(arguments(folder, f"moved-{z}", z) for z in ZERO),
         arguments(folder, "wandered", 3))  # fmt: skip
    return folder


def take(world: int, stop: int, *runs: str) -> None:
    run_ranks("tests.train.takes", world, str(stop), *runs)


def arguments(folder: Path, name: str, zero: int, *overrides: str) -> str:
    """A run for tests.train.takes."""
    keys = [f"run={folder / name}", f"engine.ds_config={folder}/zero{zero}.json", "every.save=2",
            "every.keep=9", "stage1.optim.weight_decay=0.1"]  # fmt: skip
    return ",".join([str(folder / "recipe.yaml"), *keys, *overrides])


def weights(run: Path) -> dict[str, Tensor]:
    last = saved(run / "stage1")[-1]
    assert last.name == "step-000006"
    return load_file(last / "model/model.safetensors")


@pytest.mark.parametrize(
    ("name", "zero"), [*((f"moved-{zero}", zero) for zero in ZERO), ("wandered", 3)]
)
def test_other_ranks_same_parameters(folder: Path, name: str, zero: int) -> None:
    found, wanted = weights(folder / name), weights(folder / f"whole-{zero}")
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert float((found[key] - wanted[key]).norm() / wanted[key].norm()) <= TOLERANCE, key


def test_the_conversion_leaves_nothing(folder: Path) -> None:
    for path in folder.glob("*/stage1/checkpoints/*"):
        assert path.suffix == ""
        assert fault(path) == ""


def test_saved_in_the_background_or_at_once(folder: Path) -> None:
    """Bit for bit, in every file of every step."""
    for ours, theirs in zip(
        saved(folder / "at-once/stage1"), saved(folder / "whole-3/stage1"), strict=True
    ):
        for path in (ours / "state").rglob("*.pt"):
            found = torch.load(path, weights_only=False)
            wanted = torch.load(theirs / path.relative_to(ours), weights_only=False)
            assert leaves(found) == leaves(wanted)
        assert weights_equal(ours, theirs)


def weights_equal(ours: Path, theirs: Path) -> bool:
    name = "model/model.safetensors"
    return (ours / name).read_bytes() == (theirs / name).read_bytes()


def leaves(item: Any) -> list[Any]:
    """Every number and name in nested state; tensors as their bytes."""
    if isinstance(item, Tensor):
        return [item.dtype, item.shape, item.flatten().view(torch.uint8).numpy().tobytes()]
    if isinstance(item, dict):
        return [leaf for key, value in item.items() for leaf in [key, *leaves(value)]]
    if isinstance(item, (list, tuple)):
        return [leaf for value in item for leaf in leaves(value)]
    return [repr(item) if isinstance(item, (str, int, float, bool, type(None))) else type(item)]
