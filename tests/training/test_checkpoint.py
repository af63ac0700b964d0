"""A damaged checkpoint is named and skipped; one that does not fit the run is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.runs import checkpoints, fault, model_folder, saved
from lbr_ds.training.checkpoint.resume import find_checkpoint
from lbr_ds.training.checkpoint.writing import prune, seal
from lbr_ds.training.deepspeed.library import read_state
from lbr_ds.training.deepspeed.universal import to_universal
from tests.ranks import run_cli, run_ranks, train_ranks
from tests.training.test_resume import metrics, weights

pytestmark = pytest.mark.slow

OPTIM = "state/ranks/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forget_state(path: Path) -> None:
    listed = json.loads(path.read_text())
    del listed["state.json"]
    path.write_text(json.dumps(listed))


# (file, damage, what is said of it)
DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    (OPTIM, flip, "its contents have changed since it was saved (sha256)"),
    (OPTIM, truncate, "bytes, "),
    (OPTIM, Path.unlink, "missing"),
    ("state.json", flip, "its contents have changed"),
    ("model/model.safetensors", flip, "its contents have changed"),
    ("files.json", Path.unlink, "missing"),
    ("files.json", lambda path: path.write_text("{"), "not readable"),
    ("files.json", lambda path: path.write_text("[]"), "not readable"),
    ("files.json", forget_state, "lists no state.json"),
]


@pytest.fixture
def copied(trained: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of the trained run; its recipe lies beside it."""
    shutil.copytree(trained.run, tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(trained.dump().replace(str(trained.run), str(tmp_path / "run")))
    return load(recipe)


def test_whole_checkpoints_have_no_fault(trained: RunConfig) -> None:
    for path in saved(trained.run / "stage1"):
        assert fault(path) == ""
        listed = set(json.loads((path / "files.json").read_text()))
        found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert found == listed | {"files.json"}


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    copied: RunConfig,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    older, newest = saved(copied.run / "stage1")
    damage(newest / name)
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        assert find_checkpoint(copied, 1, World()) == older
    (line,) = caplog.messages
    assert f"{newest} is damaged and skipped: {name}: " in line
    assert said in line
    # Ranks that share the reading find it between them.
    assert any(fault(newest, part=rank, parts=3) for rank in range(3))
    damage(older / name)
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        find_checkpoint(copied, 1, World())


def test_readers_pass_over_what_is_short(copied: RunConfig) -> None:
    older, newest = saved(copied.run / "stage2")
    truncate(newest / "model/model.safetensors")
    assert checkpoints(copied.run / "stage2") == [older]
    assert model_folder(copied.run) == older / "model"


def test_no_checkpoint_is_step_0(copied: RunConfig) -> None:
    shutil.rmtree(copied.run / "stage1")
    assert find_checkpoint(copied, 1, World()) is None


def test_training_resumes_from_the_one_before(trained: RunConfig, copied: RunConfig) -> None:
    stage = copied.run / "stage1"
    flip(saved(stage)[-1] / OPTIM)
    left = stage / "checkpoints" / "step-000005.part"
    left.mkdir()
    (left / "half").write_text("of a file")
    said = train_ranks(2, copied.run.parent / "recipe.yaml", 1)
    assert f"step-000006 is damaged and skipped: {OPTIM}" in said
    assert "steps 3 to 6" in said
    names = {path.name for path in (stage / "checkpoints").iterdir()}
    assert names == {"step-000003", "step-000006", "step-000006.damaged"}
    assert weights(stage) == weights(trained.run / "stage1")
    assert metrics(stage) == metrics(trained.run / "stage1")


def test_force_resumes_with_another_recipe_and_number_of_ranks(copied: RunConfig) -> None:
    stage, recipe = copied.run / "stage1", str(copied.run.parent / "recipe.yaml")
    shutil.rmtree(saved(stage)[-1])
    changed = load(recipe, ["stage1.optim.lr=0.002"])
    with pytest.raises(CheckpointError, match=r"stage1.optim.lr: 0.001 -> 0.002\); .*--force"):
        find_checkpoint(changed, 1, World())
    done = run_cli("train", recipe, "--stage", "1", "--force", "stage1.optim.lr=0.002")
    assert done.returncode == 0, done.stderr
    assert "made with another recipe (stage1.optim.lr: 0.001 -> 0.002); resuming" in done.stderr
    assert "converting from 2 to 1 ranks" in done.stderr
    assert saved(stage)[-1].name == "step-000006"
    assert fault(saved(stage)[-1]) == ""


def test_other_data_and_versions(copied: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    newest = saved(copied.run / "stage1")[-1]
    facts = json.loads((newest / "state.json").read_text())
    facts["versions"]["torch"] = "1.0"
    rewrite(newest, facts)
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        assert find_checkpoint(copied, 1, World()) == newest
    assert "made with other versions (torch: 1.0 -> " in caplog.messages[0]
    facts["data"] = "0" * 64
    rewrite(newest, facts)
    with pytest.raises(CheckpointError, match=r"was trained on data 000000000000 and .* now holds"):
        find_checkpoint(copied, 1, World())
    assert find_checkpoint(copied, 1, World(), force=True) == newest


def rewrite(folder: Path, facts: dict[str, object]) -> None:
    """A state.json that its manifest vouches for."""
    (folder / "state.json").write_text(json.dumps(facts))
    listed = json.loads((folder / "files.json").read_text())
    listed["state.json"] = seal(folder / "state.json")
    (folder / "files.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(1, None, [10]), (2, None, [8, 10]), (1, 4, [4, 8, 10]), (3, 6, [6, 8, 10])],
)
def test_what_is_kept(tmp_path: Path, keep: int, keep_every: int | None, left: list[int]) -> None:
    """Step 12 is one that was skipped as damaged."""
    for step in (2, 4, 6, 8, 10, 12):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "files.json").write_text("{}")
        rewrite(folder, {"step": step})
    prune(tmp_path / "checkpoints" / "step-000010", keep, keep_every, keep_best=False)
    assert [int(path.name[5:]) for path in saved(tmp_path)] == [*left, 12]
    assert saved(tmp_path) == checkpoints(tmp_path, state=True)


def test_storage_that_fails_or_is_slow(copied: RunConfig) -> None:
    """On two ranks, see tests.training.storage."""
    run_ranks("tests.training.storage", 2, str(copied.run.parent / "recipe.yaml"))


def test_a_full_disk_ends_the_run_with_one_line(copied: RunConfig, trained: RunConfig) -> None:
    stage = copied.run / "stage1"
    shutil.rmtree(saved(stage)[-1])
    recipe = str(copied.run.parent / "recipe.yaml")
    done = run_cli("train", recipe, "--stage", "1", "--nproc", "2", file_limit=100_000)
    assert done.returncode == 4, done.stderr
    part = stage / "checkpoints" / "step-000006.part"
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert lines
    assert all(f"error: {part}: rank " in line for line in lines)
    assert "cannot write the checkpoint: File too large; free disk space" in lines[0]
    assert "Traceback" not in done.stderr
    assert [path.name for path in (stage / "checkpoints").iterdir()] == ["step-000003"]
    assert fault(saved(stage)[-1]) == ""
    train_ranks(2, recipe, 1)
    assert weights(stage) == weights(trained.run / "stage1")


class Attribute:
    """Pickles as getattr(of, name), as Python before 3.11.4 does with a member of an enum."""

    def __init__(self, of: type, name: str) -> None:
        self.asked = (of, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.asked


def test_enums_of_older_pythons_are_read_and_no_other_attributes(tmp_path: Path) -> None:
    member = ZeroStageEnum.weights
    torch.save({"zero_stage": Attribute(ZeroStageEnum, "weights")}, tmp_path / "old.pt")
    torch.save({"zero_stage": member}, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        assert read_state(tmp_path / name) == {"zero_stage": member}
    torch.save(Attribute(LossScaler, "backward"), tmp_path / "other.pt")
    with pytest.raises(UnpicklingError, match="LossScaler is not an enum"):
        read_state(tmp_path / "other.pt")
    line = r"other.pt: .*LossScaler is not an enum"
    assert re.match(line, to_universal(tmp_path, tmp_path / "universal"))
    assert not (tmp_path / "universal").exists()
