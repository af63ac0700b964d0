"""The ONNX files of an export, run by onnxruntime."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.exporting import export
from lbr_ds.exporting.onnx_graph import TOLERANCE, add_pooling
from lbr_ds.model.bottleneck import load_tokenizer
from lbr_ds.model.packed_encoder import PackedEncoder
from tests.exporting.test_layout import TEXTS, made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    export(made(folder, rope_parameters=scaled), folder / "out", int8=True)
    return folder / "out"


def run(folder: Path, name: str, batch: Any) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "onnx" / name)
    (found,) = session.run(None, {key: batch[key] for key in ("input_ids", "attention_mask")})
    return np.asarray(found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooled_vectors_are_the_trainers(exported: Path, side: str) -> None:
    tokenizer = load_tokenizer(exported)
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")
    found = run(exported, "model_pooled.onnx", batch)
    assert np.abs(found - PackedEncoder(exported).encode(TEXTS)).max() <= TOLERANCE


def test_states_are_the_models(exported: Path) -> None:
    batch: Any = load_tokenizer(exported)(
        TEXTS[:3], padding=True, truncation=True, return_tensors="np"
    )
    states = run(exported, "model.onnx", batch)
    assert states.shape == (*batch["input_ids"].shape, 32)
    last = states[np.arange(3), batch["attention_mask"].sum(1) - 1]
    last /= np.linalg.norm(last, axis=1, keepdims=True)
    assert np.abs(last - PackedEncoder(exported).encode(TEXTS[:3])).max() <= TOLERANCE


def test_one_file_of_weights_and_no_paths(exported: Path) -> None:
    held = set()
    for name in ("model.onnx", "model_pooled.onnx"):
        path = exported / "onnx" / name
        assert b"site-packages" not in path.read_bytes()
        weights = onnx.load(path, load_external_data=False).graph.initializer
        held |= {
            entry.value for w in weights for entry in w.external_data if entry.key == "location"
        }
    assert held == {"model.onnx_data"}


def test_proof_and_card_tell_the_loss_of_8_bits(exported: Path) -> None:
    proof = json.loads((exported / "parity.json").read_text())["onnx"]
    assert proof["largest_difference"] <= proof["limit"] == TOLERANCE
    assert 0.9 < proof["int8_least_cosine"] <= proof["int8_mean_cosine"] < 1
    card = (exported / "README.md").read_text()
    assert f"{proof['int8_least_cosine']:.4f}" in card
    assert "model_pooled.onnx" in card


def test_mean_pooling_leaves_padding_out(exported: Path) -> None:
    batch: Any = load_tokenizer(exported)(TEXTS, padding=True, truncation=True, return_tensors="np")
    add_pooling(exported / "onnx" / "model.onnx", exported / "onnx" / "mean.onnx", "mean")
    states, mask = run(exported, "model.onnx", batch), batch["attention_mask"]
    for row, vector in enumerate(run(exported, "mean.onnx", batch)):
        mean = states[row, : mask[row].sum()].mean(0)
        assert np.abs(vector - mean / np.linalg.norm(mean)).max() <= TOLERANCE


def test_missing_packages_are_named_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(EnvironmentProblem, match="--onnx needs onnxruntime, not installed here"):
        export(tmp_path / "nowhere", tmp_path / "out", onnx=True)
