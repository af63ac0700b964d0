"""Training with compiled layers equals training with eager ones, under ZeRO 1, 2 and 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import ALONE
from lbr_ds.model.attention_costs import RECTANGLES, VARLEN, Cost, Kernels
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.runs import checkpoints
from lbr_ds.training import kernels as kernels_of_runs
from tests.ranks import run_cli, run_ranks
from tests.tiny import tiny_recipe
from tests.training.compiled import CASES, STEPS
from tests.training.test_resume import evaluations, metrics, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = load(tiny_recipe(tmp_path_factory.mktemp("compiled"), group_every=20))
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    (run.run / "recipe.yaml").write_text(run.dump())
    zero: dict[str, Any] = {"overlap_comm": False, "stage3_param_persistence_threshold": 0}
    for stage in (1, 2, 3):
        config = {"zero_optimization": {"stage": stage, **zero}}
        (run.run / f"zero{stage}.json").write_text(json.dumps(config))
    return run


# All of them take two minutes, so only one runs outside of `pytest -m suites`.
@pytest.fixture(
    scope="module",
    params=[
        (2, ["zero3"]),
        pytest.param((1, [*CASES]), marks=pytest.mark.suites),
        pytest.param((2, [*CASES]), marks=pytest.mark.suites),
    ],
    ids=["zero3-on-2", "all-on-1", "all-on-2"],
)
def found(request: Any, run: RunConfig) -> dict[str, Any]:
    world, cases = request.param
    run_ranks("tests.training.compiled", world, str(run.run / "recipe.yaml"), str(run.run), *cases)
    return {"cases": cases, **torch.load(run.run / f"compiled-{world}.pt")}


def test_losses_and_gradients_are_the_same(found: dict[str, Any]) -> None:
    for case in found["cases"]:
        eager, compiled = found[case]
        assert len(eager) == len(compiled) == STEPS
        for (loss, grads), (other_loss, others) in zip(compiled, eager, strict=True):
            assert loss == pytest.approx(other_loss, rel=1e-6)
            assert grads.keys() == others.keys()
            for name, grad in grads.items():
                assert float((grad - others[name]).norm()) <= 1e-5 * float(others[name].norm())


def test_nothing_more_is_kept_for_the_backward(found: dict[str, Any]) -> None:
    """Under ZeRO-3, where a view of a gathered parameter would keep all of it."""
    eager, compiled = found["kept"]
    assert 0 < compiled <= eager
    assert not found["by_part"]  # its modules' hooks would run inside of a graph
    assert not found["graph_breaks"]
    assert found["graphs"] > 0


@pytest.mark.suites
def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, with evaluations; all of it compiled."""
    monkeypatch.setenv("LBR_COMPILE_BACKEND", "aot_eager")
    recipe = tiny_recipe(tmp_path, model__compile=True, stage1__num_steps=4, every__save=2)
    words = ["train", str(recipe), "--stage", "1"]
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert "compiling the decoder layers (once; cached in" in done.stderr
    assert "compiled LlamaDecoderLayer in" in done.stderr
    folder = tmp_path / "run" / "stage1"
    shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(checkpoints(folder)[-1])
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert "steps 2 to 4" in done.stderr
    assert weights(folder) == weights(tmp_path / "whole")
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert evaluations(folder) == evaluations(tmp_path / "whole")


def test_a_resumed_run_chooses_kernels_as_before(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the costs that its first start has measured, whatever a later one would measure."""

    def measured(seconds: float) -> None:
        costs = {RECTANGLES: Cost(seconds, 1e-15, 0), VARLEN: Cost(0.1 + 0.2, 3e-15, 1 / 3)}
        monkeypatch.setattr(kernels_of_runs, "calibrate", lambda *_: Kernels(costs))

    measured(1e-5)
    first = kernels_of_runs.attention_kernels(run, torch.float32, ALONE)
    measured(2e-5)
    assert kernels_of_runs.attention_kernels(run, torch.float32, ALONE) == first
    assert kernels_of_runs.attention_kernels(run, torch.float16, ALONE) != first
    (run.run / kernels_of_runs.COSTS).unlink()
