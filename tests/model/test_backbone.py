"""A backbone in a GGUF file is dequantised as it is, and refused when a tensor is missing."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedTokenizerFast

from lbr_ds.config.recipe import ModelConfig
from lbr_ds.errors import ConfigError
from lbr_ds.model.backbone import open_backbone
from tests.tiny import backbone

# Names of the tensors outside and inside of a decoder layer.
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    stem, kind = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    _, _, number, inner = stem.split(".", 3)
    return f"blk.{number}.{LAYER[inner]}.{kind}"


def as_gguf(folder: Path, path: Path, without: str = "") -> Path:
    """A Qwen2 folder as a GGUF file in fp32, without one of its tensors."""
    config = AutoConfig.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if gguf_name(name) != without:
            writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("sound") / "raw", "qwen2")


def test_a_gguf_file_has_the_weights_of_the_folder(sound: Path, tmp_path: Path) -> None:
    path = as_gguf(sound, tmp_path / "model.gguf")
    opened = open_backbone(ModelConfig(backbone=str(path), max_length=32))
    found = opened.module.state_dict()
    for name, tensor in load_file(sound / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        ("blk.1.ffn_up.weight", "1 tensor is missing (model.layers.1.mlp.up_proj.weight)"),
        ("blk.0.attn_q.bias", "1 tensor is missing (model.layers.0.self_attn.q_proj.bias)"),
        ("output_norm.weight", "1 tensor is missing (model.norm.weight)"),
        ("token_embd.weight", "2 tensors are missing (lm_head.weight, model.embed_tokens.weight)"),
    ],
)
def test_a_gguf_file_without_a_tensor(
    sound: Path, tmp_path: Path, without: str, missing: str
) -> None:
    path = as_gguf(sound, tmp_path / "model.gguf", without)
    with pytest.raises(ConfigError) as raised:
        open_backbone(ModelConfig(backbone=str(path), max_length=32))
    assert str(raised.value).startswith(f"model.backbone={str(path)!r}: {missing}; ")


def test_a_cut_gguf_file(sound: Path, tmp_path: Path) -> None:
    path = as_gguf(sound, tmp_path / "model.gguf")
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"model\.gguf'.*copy or fetch the GGUF file again"):
            open_backbone(ModelConfig(backbone=str(path), max_length=32))
