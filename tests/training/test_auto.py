"""A training with keys that are `auto`: what it takes, records, and takes again when it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lbr_ds.config import load
from lbr_ds.distributed import World
from lbr_ds.plan import Cluster, auto, find_gpu
from lbr_ds.plan.fit import fill
from lbr_ds.plan.memory import activations
from lbr_ds.plan.shape import shape_of
from lbr_ds.plan.work import work_of
from lbr_ds.runs import saved
from lbr_ds.training import reduction
from lbr_ds.training.auto import settle
from tests.ranks import run_cli, run_ranks
from tests.tiny import backbone, tiny_recipe

KEYS = [
    "engine.ds_config=auto",
    "model.activation_checkpointing=auto",
    "stage1.micro_batch_tokens=auto",
    "every.evaluate=null",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_recipe(tmp_path_factory.mktemp("auto")))


def planned(recipe: str, gib: float) -> auto.Choice:
    run = load(recipe, KEYS)
    gpu = find_gpu("cpu").model_copy(update={"memory_gib": gib})
    return auto.choose(run, 1, shape_of(run), Cluster(1, 1, gpu))


def train(recipe: str, run: Path, *more: str) -> str:
    done = run_cli("train", recipe, "--stage", "1", *KEYS, f"run={run}", *more)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "stage1" / "auto.json").read_text())["choice"]
    return found


def test_a_run_takes_what_the_plan_chooses_and_keeps_it(recipe: str, tmp_path: Path) -> None:
    """A hair less memory than the largest micro-batch needs; and a resume with plenty."""
    roomy = planned(recipe, 1e3)
    assert (roomy.ds_config, roomy.activation_checkpointing) == ("zero1_cpu", False)
    need = roomy.peak_gib / fill(find_gpu("cpu"))
    assert settled(recipe, tmp_path / "enough", need * 1.0001) == roomy.micro_batch_tokens

    tight, whole, run = planned(recipe, need * 0.9999), tmp_path / "whole", tmp_path / "resumed"
    assert (tight.micro_batch_tokens, tight.activation_checkpointing) != (
        roomy.micro_batch_tokens,
        roomy.activation_checkpointing,
    )
    told = train(recipe, whole, f"engine.memory_gib={need * 0.9999}")
    assert f"auto: {auto.values(load(recipe, KEYS), 1, tight)}: the cheapest that fits" in told
    shutil.copytree(whole, run)
    shutil.rmtree(run / "stage1" / "checkpoints" / "step-000006")
    told = train(recipe, run, "engine.memory_gib=1000")
    assert "as this stage started" in told
    assert record(run) == record(whole)
    assert weights(run) == weights(whole)


def settled(recipe: str, folder: Path, gib: float, *more: str) -> int:
    """The micro-batch of a start in this process."""
    run = load(recipe, [*KEYS, f"run={folder}", f"engine.memory_gib={gib}", *more])
    return settle(run, 1, World())[0].stage1.micro_tokens


@pytest.mark.parametrize(
    ("zero", "dtype", "name"), [(3, "float32", "zero3_cpu"), (2, "bfloat16", "zero2")]
)
def test_a_run_keeps_the_zero_stage_of_its_checkpoint(
    zero: int, dtype: str, name: str, recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It began under another layout by name; with `auto` it would take zero1_cpu."""
    facts = {"zero_stage": zero, "dtype": f"torch.{dtype}"}
    (tmp_path / "state.json").write_text(json.dumps(facts))
    run = load(recipe, [*KEYS, f"run={tmp_path}", "engine.memory_gib=1000"])
    assert settle(run, 1, World(), record=False)[1].name == "zero1_cpu"
    with caplog.at_level("INFO"):
        assert settle(run, 1, World(), tmp_path)[1].name == name
    assert f"ZeRO stage {zero} is that of {tmp_path}" in caplog.text


def weights(run: Path) -> dict[str, bytes]:
    last = saved(run / "stage1")[-1]
    assert last.name == "step-000006"
    tensors = load_file(last / "model" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_other_settings_make_a_record_void(recipe: str, tmp_path: Path) -> None:
    """Such as a longer text, for which the recorded micro-batch was not planned."""
    first = settled(recipe, tmp_path, 1000)
    assert settled(recipe, tmp_path, 0.001) == first
    assert settled(recipe, tmp_path, 0.001, "stage1.max_target_length=16") < first


def test_a_backbone_that_the_plan_does_not_know(
    recipe: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It trains with what needs little memory, and the log says so."""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text('{"model_type": "gpt2"}')
    run = load(recipe, [*KEYS, f"run={tmp_path}"])
    with caplog.at_level("INFO"):
        settled_run, layout = settle(run, 1, World())
    assert (layout.name, settled_run.stage1.micro_tokens) == ("zero3_cpu", 8192)
    assert settled_run.model.checkpoints_activations
    assert "without a plan" in caplog.text
    assert "not 'gpt2'" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_micro_batch_that_does_not_fit_is_halved_once(world: int, tmp_path: Path) -> None:
    """The plan counts on a terabyte; the process may map half more than half of the plan needs."""
    recipe = tiny_recipe(tmp_path)
    backbone(tmp_path / "backbone", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    keys = [*KEYS, f"stage1.samples_per_step={32 * world}", "stage1.num_steps=2", "every.save=2"]
    keys += ["engine.memory_gib=1000", "model.activation_checkpointing=false"]
    run, run_folder = load(recipe, keys), tmp_path / "run"
    work = work_of(auto.settled(run, 1, auto.Choice("zero1_cpu", False, 1024)), 1, world)
    half, _ = activations(shape_of(run), work, 4, False, 4)
    run_ranks("tests.training.short_of_memory", world, str(recipe), str(half * 3 // 2), *keys)
    assert saved(run_folder / "stage1")[-1].name == "step-000002"
    found = record(run_folder)
    assert (found["micro_batch_tokens"], found["halved"]) == (1024, True)
    told = (run_folder / "stage1" / "log" / "rank-0.log").read_text()
    line = "auto: out of memory with stage1.micro_batch_tokens=2048; starting again with 1024"
    assert told.count(line) == 1


@pytest.mark.parametrize("free", [1e3, 1e9])
def test_a_resume_reduces_gradients_as_the_run_started(
    recipe: str, tmp_path: Path, free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever memory is free then; other settings and another number of ranks decide anew."""
    engine = SimpleNamespace(num_trainable=1000, dtype=torch.float32)

    def decided(bytes_free: float, *overrides: str) -> bool:
        monkeypatch.setattr(reduction, "free_memory", lambda world: bytes_free)
        run: Any = load(recipe, [f"run={tmp_path / 'run'}", *overrides])
        stage: Any = SimpleNamespace(number=2)
        session: Any = SimpleNamespace(run=run, stage=stage, world=World(), engine=engine)
        return reduction.one_reduction(session)

    fits = free == 1e9
    file = tmp_path / "run" / "stage2" / reduction.NAME
    assert decided(free) is fits
    stored = file.read_text()
    assert [decided(other) for other in (1e3, 1e9)] == [fits, fits]
    assert file.read_text() == stored
    for other in (1e3, 1e9):
        assert decided(other, f"seed={int(other)}") is (other == 1e9)
        file.write_text(stored.replace('"world_size": 1', '"world_size": 3'))
        assert decided(other) is (other == 1e9)
