"""Both stages with adapters on two ZeRO-3 ranks, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lbr_ds.config import RunConfig, load
from lbr_ds.exporting import TOLERANCE, export, proof_texts
from lbr_ds.model.bottleneck import bottleneck_ids
from lbr_ds.runs import checkpoints, fault
from tests.ranks import run_cli, run_ranks, train_ranks
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny run with adapters, every tensor cut up."""
    folder = tmp_path_factory.mktemp("lora")
    layout = folder / "zero3.json"
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    layout.write_text(json.dumps({"zero_optimization": zero}))
    recipe = tiny_recipe(
        folder, engine__ds_config=str(layout), lora__rank=4, model__activation_checkpointing=True
    )
    for stage in ("1", "2"):
        train_ranks(2, recipe, stage)
    return load(recipe)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def last(run: RunConfig, stage: int) -> Path:
    found = checkpoints(run.run / f"stage{stage}")[-1]
    assert found.name == "step-000006"
    return found


def test_only_adapters_and_new_rows_have_moved(run: RunConfig) -> None:
    """Stage 1 against the backbone, stage 2 against stage 1, bit for bit."""
    starts = {1: run.run / "backbone", 2: last(run, 1) / "model"}
    if json.loads((run.run / "stage2/starts.jsonl").read_text())["from"].endswith("000003"):
        starts[2] = last(run, 1).with_name("step-000003") / "model"
    for stage, start in starts.items():
        before, after = weights(start), weights(last(run, stage) / "model")
        base = weights(last(run, stage) / "state" / "base")
        assert before.keys() == after.keys() == base.keys()
        for name in before:
            assert torch.equal(base[name], before[name]), name
            moved = (after[name] != before[name]).reshape(len(after[name]), -1).any(1)
            if "embed_tokens" in name:
                assert moved.nonzero()[:, 0].tolist() == bottleneck_ids(run.run / "backbone")
            else:
                assert bool(moved.any()) is ("_proj" in name), name


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_weights_are_written_once(run: RunConfig, stage: int) -> None:
    """The second checkpoint's are the first one's file."""
    found = [c / "state/base/model.safetensors" for c in checkpoints(run.run / f"stage{stage}")]
    assert [path.parents[2].name for path in found] == ["step-000003", "step-000006"]
    assert found[0].samefile(found[1])
    assert [fault(path.parents[2]) for path in found] == ["", ""]


def test_frozen_weights_have_no_state_of_an_optimizer(run: RunConfig) -> None:
    """Two moments and a weight of 4 bytes for every number that learns, and little more."""
    states = (last(run, 1) / "state" / "ranks").glob("*optim_states.pt")
    shape = {
        "q": (32, 32),
        "k": (16, 32),
        "v": (16, 32),
        "o": (32, 32),
        "gate": (64, 32),
        "up": (64, 32),
        "down": (32, 64),
    }
    learning = 2 * sum(4 * (out + into) for out, into in shape.values()) + 2 * 32
    held = sum(path.stat().st_size for path in states)
    assert 12 * learning <= held <= 12 * learning + 2 * 40_000


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_equals_uninterrupted(run: RunConfig, tmp_path: Path, stage: int) -> None:
    """From the merged weights and the base beside them; parameters bit for bit."""
    shutil.copytree(run.run, tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(run.dump().replace(str(run.run), str(tmp_path / "run")))
    own = load(recipe)
    shutil.rmtree(last(own, stage))
    assert "steps 3 to 6" in train_ranks(2, recipe, stage)
    for part in ("model", "state/base"):
        name = f"{part}/model.safetensors"
        assert (last(own, stage) / name).read_bytes() == (last(run, stage) / name).read_bytes()


def test_exported_is_what_was_trained(run: RunConfig, tmp_path: Path) -> None:
    """Two ranks that resumed with adapters, against the merged folder in stock tools."""
    from sentence_transformers import SentenceTransformer

    texts = proof_texts(run.model.max_length)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    run_ranks("tests.training.encode", 2, str(run.run / "recipe.yaml"), str(tmp_path))
    export(run.run, tmp_path / "model")
    assert not list((tmp_path / "model").rglob("*adapter*"))
    found = SentenceTransformer(str(tmp_path / "model")).encode(texts)
    assert np.abs(found - np.load(tmp_path / "vectors.npy")).max() <= TOLERANCE


def test_unknown_target_ends_with_one_line(run: RunConfig, tmp_path: Path) -> None:
    done = run_cli(
        "train",
        str(run.run / "recipe.yaml"),
        "--stage",
        "1",
        f"run={tmp_path / 'x'}",
        "lora.targets=[q_prj]",
    )
    assert done.returncode == 2
    (line,) = [text for text in done.stderr.splitlines() if "q_prj" in text]
    assert "lora.targets: 'q_prj' is not a linear layer of the backbone; choose from q_proj" in line
