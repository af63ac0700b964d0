"""The public Python API: light to import, complete, and the same as the commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lbr_ds
from lbr_ds.cli import run as run_command
from lbr_ds.config import RunConfig
from lbr_ds.errors import TrainingError
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe
from tests.training.test_resume import weights


def test_import_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'deepspeed', 'mteb', 'numpy', 'pydantic'}"
    code = f"import sys, lbr_ds; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", lbr_ds.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert name in dir(lbr_ds)
    value = getattr(lbr_ds, name)
    assert name == "__version__" or value.__doc__


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = lbr_ds.fly


@pytest.mark.slow
def test_training_is_that_of_the_command(tmp_path: Path) -> None:
    """One rank that `train` starts for each stage, and one that a launcher started for both."""
    runs = [lbr_ds.load_recipe(tiny_recipe(tmp_path / name)) for name in ("started", "launched")]
    lbr_ds.prepare(runs[0])
    for stage in (1, 2):
        checkpoint = lbr_ds.train(runs[0], stage)
        assert checkpoint.parent.parent == runs[0].run / f"stage{stage}"
    run_ranks("tests.api_stages", 1, str(tmp_path / "launched" / "recipe.yaml"))
    for stage in ("stage1", "stage2"):
        assert weights(runs[0].run / stage) == weights(runs[1].run / stage)
    absent = lbr_ds.load_recipe(runs[1].run / "recipe.yaml", [f"data.folder={tmp_path / 'none'}"])
    with pytest.raises(TrainingError, match="stage 1: a rank ended with code 3") as failed:
        lbr_ds.train(absent, 1)
    assert failed.value.exit_code == 3


@pytest.mark.slow
def test_a_process_that_has_left_its_group_trains_again(tmp_path: Path) -> None:
    """DeepSpeed must not keep groups of the world that was left; the weights are the same."""
    recipe = tiny_recipe(tmp_path)
    for name in ("first", "second"):
        given = ["--stage", "1", "--nproc", "1", f"run={tmp_path / name}", "stage1.num_steps=2"]
        assert run_command(["train", str(recipe), *given]) == 0
    assert weights(tmp_path / "first" / "stage1") == weights(tmp_path / "second" / "stage1")


def test_encode_evaluate_export(trained: RunConfig, tmp_path: Path) -> None:
    """A run and its export give the same vectors, and scores come from the same model."""
    parity = lbr_ds.export(trained.run, tmp_path / "model")
    texts = parity["texts"][:5]
    ours = lbr_ds.Encoder(trained.run).encode_documents(texts)
    stock = lbr_ds.Encoder(tmp_path / "model").encode_documents(texts)
    np.testing.assert_allclose(ours, stock, atol=1e-5)
    result = lbr_ds.evaluate(trained.run, data=trained.data.folder)
    assert all(0 <= task["ndcg_at_10"] <= 1 for task in result["tasks"].values())
