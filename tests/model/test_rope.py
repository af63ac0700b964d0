"""Rotary positions in the keys of transformers 4: what its configuration classes read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.rope import legacy_rope, write_legacy_rope
from tests.tiny import SHAPE, backbone

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 30}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [2.0, 3.0, 4.0, 5.0]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64}


def both(kind: str, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": kind, "type": kind, **scaling}


NONE = {"rope_scaling": None}  # some classes have a scaling by default

# model type, rope_parameters, the keys that transformers 4.57's configuration class reads
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SmolLM2": ("llama", {"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5, **NONE}),
    "Qwen2.5": ("qwen2", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6, **NONE}),
    "Llama-3.2": (
        "llama",
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": both("llama3", **LLAMA3)},
    ),
    "linear": (
        "mistral",
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        {"rope_theta": 1e6, "rope_scaling": both("linear", factor=2.0)},
    ),
    "dynamic": (
        "gemma",
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        {"rope_theta": 1e4, "rope_scaling": both("dynamic", factor=3.0)},
    ),
    "OLMo 2": (  # its configuration refuses a third key
        "olmo2",
        {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "yarn": (
        "qwen3",
        {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
        {"rope_theta": 1e6, "rope_scaling": both("yarn", **YARN)},
    ),
    "yarn with the factor left to the lengths": (
        "qwen3",
        {"rope_type": "yarn", "rope_theta": 1e6, **YARN, "factor": None},
        {"rope_theta": 1e6, "rope_scaling": both("yarn", **{**YARN, "factor": 8.0})},
    ),
    "longrope": (
        "llama",
        {"rope_type": "longrope", "rope_theta": 1e4, **LONGROPE},
        {
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "rope_scaling": both("longrope", **LONGROPE),
        },
    ),
    "longrope with a factor that is not the lengths'": (
        "llama",
        {"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0, **LONGROPE},
        {
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "rope_scaling": both(
                "longrope",
                factor=32.0,
                **LONGROPE,
                attention_factor=math.sqrt(1 + math.log(32) / math.log(64)),
            ),
        },
    ),
    "Phi-3": (  # refuses a rope_scaling of more than these three keys
        "phi3",
        {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **LONGROPE},
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        },
    ),
    "Phi-2": (
        "phi",
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
        {"rope_theta": 2e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
    ),
    "Pythia": (  # reads names of its own
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25},
        {
            "rope_theta": 2e4,
            "partial_rotary_factor": 0.25,
            "rotary_emb_base": 2e4,
            "rotary_pct": 0.25,
            "rope_scaling": None,
        },
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 2e4,
            "rope_scaling": both("linear", factor=8.0),
        },
    ),
    "OLMo 3": (
        "olmo3",
        {
            "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, **YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
        {"rope_theta": 5e5, "rope_scaling": both("yarn", **YARN)},
    ),
}


def saved(family: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The config.json that transformers writes for a tiny model with these positions."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    nested = any(isinstance(value, dict) for value in parameters.values())
    more = layers if nested else {}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {**SHAPE, **ids, "vocab_size": 64, "head_dim": 8, "rope_parameters": parameters, **more}
    if family == "phi3":  # its own field comes before that of rope_parameters
        shape["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
    config = AutoConfig.for_model(family, **json.loads(json.dumps(shape)))
    return json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", TABLE)
def test_the_keys_that_transformers_4_reads(name: str) -> None:
    family, parameters, keys = TABLE[name]
    assert legacy_rope(saved(family, parameters)) == (keys, "")


@pytest.mark.parametrize("name", TABLE)
def test_both_forms_say_the_same(name: str, tmp_path: Path) -> None:
    """transformers' own conversion of the old keys gives the states that the new ones gave."""
    family, parameters, keys = TABLE[name]
    config = saved(family, parameters)
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | keys
    states = []
    for number, content in enumerate((config, config | keys, old)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
        ids = torch.arange(100)[None] % 64  # beyond the original lengths
        with torch.no_grad():
            states.append(model(input_ids=ids).last_hidden_state)
    assert torch.equal(states[0], states[1])
    if "factor that is not" not in name:  # the new reader takes the factor from there too
        assert torch.equal(states[0], states[2])


# model type, rope_parameters, what is said to be lacking, whether transformers 4 then refuses it
LACKING: list[tuple[str, dict[str, Any], str, bool]] = [
    ("llama", {"rope_type": "proportional", "rope_theta": 1e4}, "rope_type 'proportional'", True),
    (
        "llama",
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2]},
        "rope_type 'default' with mrope_section",
        True,
    ),
    (
        "phi3",
        {"rope_type": "longrope", "rope_theta": 1e4, "factor": 3.0, **LONGROPE},
        "rope_type 'longrope' of phi3 with attention_factor",
        True,
    ),
    (
        "olmo2",
        {"rope_type": "yarn", "rope_theta": 1e4, **YARN},
        "rope_type 'yarn' of olmo2 with factor",
        True,
    ),
    (
        "olmo2",
        {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3},
        "rope_type 'llama3' of olmo2 with factor",
        True,
    ),
    (
        "nemotron",
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        "rope_type 'linear' of nemotron with factor",
        True,
    ),
    (
        "olmo3",
        {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "a rope_theta of its own for the layers with sliding windows",
        False,
    ),
    (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
        "a scaling of the layers with sliding windows",
        False,
    ),
    (
        "ministral",
        {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "a form for each type of layer of ministral",
        False,
    ),
]


@pytest.mark.parametrize(("family", "parameters", "lacks", "written"), LACKING)
def test_what_transformers_4_cannot_read(
    family: str, parameters: dict[str, Any], lacks: str, written: bool
) -> None:
    """A scaling is written whole, to be refused; of a form for each layer type there is nothing."""
    config = {"model_type": family, "rope_parameters": parameters, "max_position_embeddings": 128}
    keys, said = legacy_rope(config)
    assert said.startswith(lacks)
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", "rope_type")}
    assert bool(keys) == written
    assert not written or scaling.items() <= keys["rope_scaling"].items()


def test_a_model_without_rotary_positions_is_left_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    assert write_legacy_rope(tmp_path) == ""
    assert json.loads((tmp_path / "config.json").read_text()) == before


def test_a_prepared_backbone_has_both_forms(tmp_path: Path) -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    raw = backbone(tmp_path / "raw", rope_parameters=parameters)
    prepare_backbone(
        ModelConfig(backbone=str(raw), max_length=32),
        BottleneckConfig(count=2),
        tmp_path / "made",
        seed=0,
    )
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == both("llama3", **LLAMA3)
    assert config["rope_parameters"] == parameters
