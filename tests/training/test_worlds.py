"""A run that resumes with another number of ranks equals one that kept its own, ZeRO 1, 2 and 3.

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
from lbr_ds.training.deepspeed.library import read_state
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow

ZERO = (1, 2, 3)
LORA = {"lora-2": 2, "lora-3": 3}  # adapters, under these
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks and six steps, and copies that changed ranks on the way.

    whole-Z: ZeRO stage Z throughout. moved-Z: from its step 2 on four ranks. 3 also: from step 2 on
    one rank, from 4 on two, from 5 on four (`wandered`). at-once: ZeRO 3, saved on the spot.
    Both kinds also with adapters. whole-dropout, resumed-dropout: these and dropout, ZeRO 3; the
    second stopped after step 2 and resumed with as many ranks.
    """
    folder = tmp_path_factory.mktemp("worlds")
    tiny_recipe(folder)
    for zero in ZERO:
        config: dict[str, Any] = {"stage": zero, "overlap_comm": False}
        if zero == 3:
            config["stage3_param_persistence_threshold"] = 100
        (folder / f"zero{zero}.json").write_text(json.dumps({"zero_optimization": config}))
    dropout = ("lora.rank=3", "lora.dropout=0.1")
    take(
        2,
        6,
        *(arguments(folder, f"whole-{z}", z) for z in ZERO),
        *(arguments(folder, f"whole-{n}", z, "lora.rank=3") for n, z in LORA.items()),
        arguments(folder, "whole-dropout", 3, *dropout),
        arguments(folder, "at-once", 3, "every.save_async=false"),
    )
    origins = {f"moved-{n}": n for n in (*ZERO, *LORA)}
    for name, origin in {**origins, "wandered": 3, "resumed-dropout": "dropout"}.items():
        for place in ("backbone", "stage1/checkpoints/step-000002"):
            shutil.copytree(folder / f"whole-{origin}" / place, folder / name / place)
    take(2, 6, arguments(folder, "resumed-dropout", 3, *dropout))
    take(1, 4, arguments(folder, "wandered", 3))
    take(2, 5, arguments(folder, "wandered", 3))
    take(
        4,
        6,
        *(arguments(folder, f"moved-{z}", z) for z in ZERO),
        *(arguments(folder, f"moved-{n}", z, "lora.rank=3") for n, z in LORA.items()),
        arguments(folder, "wandered", 3),
    )
    return folder


def take(world: int, stop: int, *runs: str) -> None:
    run_ranks("tests.training.takes", world, str(stop), *runs)


def arguments(folder: Path, name: str, zero: int, *overrides: str) -> str:
    """A run for tests.training.takes."""
    keys = [
        f"run={folder / name}",
        f"engine.ds_config={folder}/zero{zero}.json",
        "every.save=2",
        "every.keep=9",
        "stage1.optim.weight_decay=0.1",
    ]
    return ",".join([str(folder / "recipe.yaml"), *keys, *overrides])


def weights(run: Path) -> dict[str, Tensor]:
    last = saved(run / "stage1")[-1]
    assert last.name == "step-000006"
    return load_file(last / "model/model.safetensors")


@pytest.mark.parametrize("name", [*(f"moved-{n}" for n in (*ZERO, *LORA)), "wandered"])
def test_other_ranks_same_parameters(folder: Path, name: str) -> None:
    origin = name.replace("moved", "whole").replace("wandered", "whole-3")
    found, wanted = weights(folder / name), weights(folder / origin)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert float((found[key] - wanted[key]).norm() / wanted[key].norm()) <= TOLERANCE, key


def test_states_of_every_stage_are_read_as_data(folder: Path) -> None:
    for name in ("whole-1", "whole-2", "whole-3", "whole-lora-2", "whole-lora-3"):
        files = sorted(folder.glob(f"{name}/stage1/checkpoints/step-000006/state/ranks/*.pt"))
        assert len(files) >= 2
        for file in files:
            assert read_state(file)


def test_the_conversion_leaves_nothing(folder: Path) -> None:
    for path in folder.glob("*/stage1/checkpoints/*"):
        assert path.suffix == ""
        assert fault(path) == ""


@pytest.mark.parametrize(
    ("name", "other"), [("at-once", "whole-3"), ("resumed-dropout", "whole-dropout")]
)
def test_saved_at_once_or_resumed_is_the_same(folder: Path, name: str, other: str) -> None:
    """Bit for bit, in every file of every step."""
    for ours, theirs in zip(
        saved(folder / name / "stage1"), saved(folder / other / "stage1"), strict=True
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
