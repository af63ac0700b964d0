"""The two layouts of an export: every reader of ours takes both, and the vectors are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.evaluation.generation import score_generation
from lbr_ds.exporting import TOLERANCE, export, proof_texts
from lbr_ds.model.bottleneck import Card, prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from tests.tiny import backbone

TEXTS = proof_texts(32)


def made(folder: Path, family: str = "llama", **shape: Any) -> Path:
    """A prepared backbone, as a checkpoint's model would be."""
    raw = backbone(folder / "raw", family, **shape)
    model = ModelConfig(backbone=str(raw), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), folder / "made", seed=0)
    return folder / "made"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`made`, with a head of its own, exported for `embedding` and as a `generator`."""
    folder = tmp_path_factory.mktemp("untied")
    source = made(folder, tie_word_embeddings=False)
    export(source, folder / "embedding")
    export(source, folder / "generator", causal_lm=True)
    return folder


def test_base_model_for_servers(untied: Path) -> None:
    names = load_file(untied / "embedding" / "model.safetensors").keys()
    model, report = AutoModel.from_pretrained(untied / "embedding", output_loading_info=True)
    assert names == model.state_dict().keys()  # as Rust and C++ readers want them
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    config = json.loads((untied / "embedding" / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert not Card.load(untied / "embedding").head


def test_generator_is_what_was_trained(untied: Path) -> None:
    ours, theirs = (load_file(untied / n / "model.safetensors") for n in ("made", "generator"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((untied / "generator" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is False
    _, report = AutoModelForCausalLM.from_pretrained(untied / "generator", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("layout", ["embedding", "generator"])
def test_every_reader_takes_both(untied: Path, layout: str) -> None:
    expected = PackedEncoder(untied / "made").encode(TEXTS)
    folder = untied / layout
    assert np.array_equal(PackedEncoder(folder).encode(TEXTS), expected)
    mined = Encoder(str(folder)).encode(TEXTS, "document")
    assert np.abs(mined - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "shape"), [("gpt2", {"hidden_size": 24}), ("qwen2", {"tie_word_embeddings": True})]
)
def test_a_tied_head_is_never_lost(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    """The embeddings are the head; GPT-2 has another prefix than `model.`."""
    source = made(tmp_path, family, **shape)
    export(source, tmp_path / "out")
    assert Card.load(tmp_path / "out").head
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]  # no token types
    export(tmp_path / "out", tmp_path / "again", causal_lm=True)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("made", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_missing_head_is_not_made_up(untied: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"--causal-lm: .* has no language-model head; export"
    ):
        export(untied / "embedding", tmp_path / "out", causal_lm=True)
    with pytest.raises(ConfigError, match=r"--generation: .* has no language-model head, so it"):
        score_generation(untied / "embedding", None)  # type: ignore[arg-type]
    again = export(untied / "embedding", tmp_path / "again")
    assert again["largest_difference"] <= TOLERANCE


def test_an_export_is_a_backbone_again(untied: Path, tmp_path: Path) -> None:
    """Its B is taken for tokens of the backbone; the rows that both have are the same."""
    for layout, head in (("embedding", False), ("generator", True)):
        model = ModelConfig(backbone=str(untied / layout), max_length=32)
        prepare_backbone(model, BottleneckConfig(count=2), tmp_path / layout, seed=0)
        assert Card.load(tmp_path / layout).head == head
        ours = load_file(tmp_path / layout / "model.safetensors")["model.norm.weight"]
        assert torch.equal(
            ours, load_file(untied / "made" / "model.safetensors")["model.norm.weight"]
        )
