"""Checkpoints, backbones and exports that have changed since they were written are never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lbr_ds import runs
from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError
from lbr_ds.evaluation import load_model
from lbr_ds.exporting import export
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.system.locate import file_sha256
from lbr_ds.training.checkpoint.resume import first_complete
from tests.tiny import backbone


@pytest.fixture(scope="module")
def backbone_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = ModelConfig(backbone=str(backbone(folder / "raw")), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), folder / "backbone", 0)
    return folder / "backbone"


@pytest.fixture
def run(backbone_made: Path, tmp_path: Path) -> Path:
    """A run folder with two checkpoints of stage 2."""
    for step in (5, 9):
        made = tmp_path / "run" / "stage2" / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(backbone_made, made / "model")
        (made / "model" / runs.MANIFEST).unlink()
        (made / "state").mkdir()
        (made / "state" / "optimizer.pt").write_bytes(bytes(99))
        (made / "state.json").write_text(json.dumps({"step": step}))
        runs.seal_folder(made)
    return tmp_path / "run"


def flip(path: Path, count: int = 60) -> None:
    """Change some bytes near the end: of weights they stay finite numbers of the same count."""
    raw = bytearray(path.read_bytes())
    for place in range(len(raw) - 4 * count, len(raw), 4):
        raw[place] ^= 1
    path.write_bytes(raw)


READERS = [
    lambda place: load_model(str(place)),
    lambda place: Encoder(str(place)),
    lambda place: export(place, place.with_name("out")),
]


@pytest.mark.parametrize("read", READERS)
def test_a_checkpoint_with_flipped_bytes_is_never_used(
    run: Path, read: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = runs.saved(run / "stage2")
    flip(newer / "model" / "model.safetensors")
    for place in (newer, newer / "model"):
        with pytest.raises(
            CheckpointError,
            match=rf"{newer}: a file is missing or has changed "
            r"\(model/model.safetensors: its contents have changed.*another checkp"
            r"oint$",
        ):
            read(place)
    for place in (run, run / "stage2"):
        assert runs.resolve_model(str(place)).folder == older / "model"
    assert f"{newer} is damaged and skipped: model/model.safetensors" in caplog.text
    flip(older / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints are damaged \(step-000005"):
        read(run)


@pytest.mark.parametrize("read", READERS)
def test_a_checkpoint_without_its_state_is_used(run: Path, read: Callable[[Path], Any]) -> None:
    """It may be deleted to save space; a resume needs it."""
    newest = runs.saved(run / "stage2")[-1]
    shutil.rmtree(newest / "state")
    for place in (run, newest):
        assert runs.model_folder(place) == newest / "model"
    assert runs.checkpoints(run / "stage2")[-1] == newest
    read(run)
    with pytest.raises(CheckpointError, match=r"state/optimizer.pt: missing\); restore one, or"):
        first_complete([newest], World())
    assert first_complete([newest], World(), state=False) == newest


def test_what_is_read_is_verified_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBR_DS_CACHE", str(run.parent / "cache"))
    monkeypatch.setattr("lbr_ds.system.locate._SETTLED", 0)
    read: list[str] = []
    monkeypatch.setattr(
        "lbr_ds.system.locate.file_sha256",
        lambda path: read.append(path.name) or file_sha256(path),
    )
    found = runs.model_folder(run)
    assert {"model.safetensors", "config.json", "state.json"} <= set(read)
    assert "optimizer.pt" not in read  # no reader of a model needs it
    read.clear()
    assert runs.model_folder(run) == found
    assert read == []
    (found / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model/config.json: 2 bytes, \d+ were saved"):
        runs.model_folder(found)


def test_an_export_is_verified_too(backbone_made: Path, tmp_path: Path) -> None:
    export(backbone_made, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")  # its user's to edit
    assert runs.resolve_model(str(tmp_path / "out")).ours
    flip(tmp_path / "out" / "model.safetensors")
    for read in READERS[:2]:
        with pytest.raises(
            CheckpointError, match=r"out: a file .*\(model.safetensors: .*sha256.*files.json$"
        ):
            read(tmp_path / "out")
    (tmp_path / "out" / runs.MANIFEST).unlink()  # a folder of before, or one changed on purpose
    assert runs.resolve_model(str(tmp_path / "out")).ours


def test_a_damaged_backbone_is_prepared_again(
    backbone_made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ModelConfig(backbone=str(backbone_made.parent / "raw"), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), tmp_path / "backbone", 0)
    weights = tmp_path / "backbone" / "model.safetensors"
    before = weights.read_bytes()
    flip(weights)
    prepare_backbone(model, BottleneckConfig(count=2), tmp_path / "backbone", 0)
    assert "is damaged and prepared again: model.safetensors" in caplog.text
    assert weights.read_bytes() == before
