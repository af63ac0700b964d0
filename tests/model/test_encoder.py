"""The packed encoder: a text's vector does not depend on its company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.encoder import PackedEncoder
from tests.tiny import backbone, records


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PackedEncoder:
    folder: Path = tmp_path_factory.mktemp("encoder")
    model = ModelConfig(backbone=str(backbone(folder / "raw")), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), folder / "model", 0)
    return PackedEncoder(folder / "model")


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
