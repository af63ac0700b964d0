"""Exports of random-weight models with the forms of RoPE that real backbones have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbr_ds import lineage
from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.exporting import export
from lbr_ds.lineage import Dataset, Training
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.runs import seal_folder
from tests.tiny import backbone

_LENGTH = 512
DIMENSIONS = (128, 64)  # to which the vectors may be truncated
# Heads of 64 numbers: vLLM has kernels for the usual sizes alone.
_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# The names are those of the backbones whose form of RoPE they have.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}),
    "llama-3.2": ("llama", {"rope_parameters": _LLAMA3}),
    "qwen2.5": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}),
}


@pytest.fixture(scope="session", params=SHAPES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder of one shape; its texts have up to 512 tokens, and more."""
    family, changes = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shape = {**_SHAPE, "max_position_embeddings": 4096, **changes}
    source = backbone(folder / "backbone", family, **shape)
    model = ModelConfig(backbone=str(source), max_length=_LENGTH)
    prepare_backbone(model, BottleneckConfig(count=4), folder / "prepared", seed=0)
    made = lineage.load(folder / "prepared")
    assert made is not None
    data = Dataset(name="made up", place="", fingerprint="0-0", protocol="random", splits={})
    training = Training(stage=2, split="cl", steps=1, samples=1, data=data, dimensions=DIMENSIONS)
    made.trained(training).save(folder / "prepared")
    (folder / "prepared" / "files.json").unlink()
    seal_folder(folder / "prepared")
    export(folder / "prepared", folder / "model")
    return folder / "model"
