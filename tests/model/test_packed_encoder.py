"""The packed encoder: a text's vector does not depend on its company."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from tests.tiny import backbone, records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("encoder")
    model = ModelConfig(backbone=str(backbone(root / "raw")), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), root / "model", 0)
    return root / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PackedEncoder:
    return PackedEncoder(folder)


@pytest.mark.parametrize("batch_tokens", [1, 40, 300, None])
def test_each_text_as_if_alone_and_in_its_place(
    encoder: PackedEncoder, batch_tokens: int | None
) -> None:
    texts = [text for r in records(12) for text in (r["query"], r["positives"][0])]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    found = encoder.encode(texts, batch_tokens=batch_tokens)
    assert found.shape == (24, 32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone, atol=1e-6)
    assert len({row.tobytes() for row in found.round(4)}) == 24


@pytest.mark.parametrize("lacking", [True, False])
def test_bf16_weights_on_a_cpu(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    """Read in fp32 where the CPU knows no bf16, and as they are stored elsewhere."""
    texts = [r["query"] for r in records(6)]
    stored = shutil.copytree(folder, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16)
    model.save_pretrained(stored)
    wide, narrow = (
        PackedEncoder(stored, "cpu", dtype).encode(texts) for dtype in (torch.float32, "auto")
    )
    assert not np.array_equal(wide, narrow)
    monkeypatch.setattr("lbr_ds.model.packed_encoder.cpu_lacks_bf16", lambda: lacking)
    found = PackedEncoder(stored, "cpu").encode(texts)
    np.testing.assert_array_equal(found, wide if lacking else narrow)
