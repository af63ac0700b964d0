"""What a model's name may be, and that its fingerprint follows its content."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.errors import CheckpointError
from lbr_ds.mining.encoders import Own, Stock, find_encoder
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.encoder import PackedEncoder
from tests.tiny import backbone


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = ModelConfig(backbone=str(backbone(folder / "raw")), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), folder / "run" / "backbone", 0)
    return folder / "run"


def test_a_run_goes_through_our_own_encoder(prepared: Path) -> None:
    encoder = find_encoder(str(prepared))
    assert isinstance(encoder, Own)
    texts = ["acute pain", "a cyst of the liver"]
    expected = PackedEncoder(prepared / "backbone").encode(texts)
    assert np.array_equal(encoder.encode(texts, "query"), expected)


def test_a_changed_file_changes_the_fingerprint(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "run")
    before = find_encoder(str(prepared)).fingerprint
    assert find_encoder(str(tmp_path / "run")).fingerprint == before
    config = tmp_path / "run" / "backbone" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config.json: \d+ bytes, \d+ were saved\); .*yours"):
        find_encoder(str(tmp_path / "run"))
    config.with_name("files.json").unlink()
    assert find_encoder(str(tmp_path / "run")).fingerprint != before


def test_a_plain_folder_goes_through_sentence_transformers(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert isinstance(find_encoder(str(tmp_path)), Stock)
    assert isinstance(find_encoder("owner/name"), Stock)


def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"its files cannot be loaded .*save the model again$"
    ):
        find_encoder(str(tmp_path)).encode(["a"], "query")
