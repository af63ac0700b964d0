"""A damaged model folder is refused, by tensor, wherever it is read; renamed tensors are mapped."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.distributed import ALONE
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError, ConfigError, EnvironmentProblem, LbrError
from lbr_ds.evaluation import load_model
from lbr_ds.exporting import export
from lbr_ds.model import tokens
from lbr_ds.model.bottleneck import Card, prepare_backbone
from lbr_ds.model.complete import NO_PREFIX, common_prefix, fit, not_finite, positions
from lbr_ds.model.files import INDEX, SINGLE
from lbr_ds.training.deepspeed.weights import Origin, load_weights
from tests.tiny import backbone

LAYER, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied backbone; not to be changed."""
    return backbone(tmp_path_factory.mktemp("sound") / "raw", tie_word_embeddings=False)


def prepare(folder: Path, made: Path, **changes: Any) -> Path:
    model = ModelConfig(**{"backbone": str(folder), "max_length": 32, **changes})
    prepare_backbone(model, BottleneckConfig(count=2), made, 0)
    return made


# Ways in which a folder is read. Each gives a vector or the weights, to compare where it is sound.


def as_backbone(folder: Path) -> Any:
    made = prepare(folder, folder.with_name("prepared"))
    return load_file(made / SINGLE)[LAYER].numpy()


def as_start(folder: Path) -> Any:
    """`stage2.from=FOLDER`."""
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder))
    load_weights(model.named_parameters(), folder, ALONE, lambda *_, **__: torch.no_grad())
    return dict(model.named_parameters())[LAYER].detach().numpy()


def as_scored(folder: Path) -> Any:
    model: Any = load_model(str(folder))
    return model.model.encode(["acute pain"])


def as_miner(folder: Path) -> Any:
    return Encoder(str(folder)).encode(["acute pain"], "query")


def with_a_card(folder: Path) -> Path:
    Card(0, 32, "last", "causal").save(folder)
    return folder


def as_own(folder: Path) -> Any:
    """A folder of ours, by the trainer's own encoder."""
    model: Any = load_model(str(with_a_card(folder)))
    return model.encoder.encode(["acute pain"], "document")


def as_export(folder: Path) -> Any:
    return export(with_a_card(folder), folder.with_name("out"))["vectors"]


EVERYWHERE = [as_backbone, as_start, as_scored, as_miner, as_own, as_export]


# Damages: each changes the tensors, and tells the words of the line.


def missing(name: str) -> Callable[[Tensors], str]:
    def damage(tensors: Tensors) -> str:
        del tensors[name]
        return rf"1 tensor is missing \((model\.)?{name.removeprefix('model.')}\)"

    return damage


def reshaped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], str]:
    def damage(tensors: Tensors) -> str:
        tensors[name] = change(tensors[name]).contiguous()
        return rf"1 tensor has a wrong shape \((model\.)?{name.removeprefix('model.')} is \("

    return damage


def spoilt(name: str, value: float, row: int) -> Callable[[Tensors], str]:
    def damage(tensors: Tensors) -> str:
        tensors[name].view(len(tensors[name]), -1)[row, -1] = value
        plain = name.removeprefix("model.")
        return rf"tensor (\S+\.)?{plain} holds a value that is not finite .* in row {row};"

    return damage


DAMAGES = {
    "layer": missing(LAYER),
    "norm": missing(NORM),
    "table": missing(TABLE),
    "transposed": reshaped("model.layers.0.mlp.up_proj.weight", lambda t: t.T),
    "empty": reshaped(LAYER, lambda t: t.new_empty(0)),
    "short": reshaped(TABLE, lambda t: t[:-3]),
    "nan": spoilt(TABLE, float("nan"), 17),
    "inf": spoilt(NORM, float("-inf"), 5),
}


def damaged(sound: Path, tmp_path: Path, damage: Callable[[Tensors], Any]) -> tuple[Path, Any]:
    folder = tmp_path / "raw"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / SINGLE)
    told = damage(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder, told


@pytest.mark.parametrize("read", EVERYWHERE)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named(
    sound: Path, tmp_path: Path, kind: str, read: Callable[[Path], Any]
) -> None:
    folder, words = damaged(sound, tmp_path, DAMAGES[kind])
    with pytest.raises(LbrError, match=words) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or str(tmp_path / "out.part") in str(caught.value)
    assert not (tmp_path / "prepared").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", EVERYWHERE)
def test_a_cut_file_is_named(sound: Path, tmp_path: Path, read: Callable[[Path], Any]) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(sound, folder)
    raw = (folder / SINGLE).read_bytes()
    for cut in (raw[:-700], raw[:50], b""):
        (folder / SINGLE).write_bytes(cut)
        with pytest.raises(LbrError, match=rf"{folder}|{tmp_path}/out.part") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def in_shards(sound: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "raw"
    shutil.copytree(sound, folder)
    (folder / SINGLE).unlink()
    model = AutoModelForCausalLM.from_pretrained(sound)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder, json.loads((folder / INDEX).read_text())


@pytest.mark.parametrize("read", EVERYWHERE)
def test_a_missing_shard(sound: Path, tmp_path: Path, read: Callable[[Path], Any]) -> None:
    folder, index = in_shards(sound, tmp_path)
    (folder / index["weight_map"][LAYER]).unlink()
    with pytest.raises(LbrError, match=index["weight_map"][LAYER]):
        read(folder)


@pytest.mark.parametrize("read", EVERYWHERE)
def test_an_index_that_names_what_is_not_there(
    sound: Path, tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    folder, index = in_shards(sound, tmp_path)
    file = folder / index["weight_map"][LAYER]
    tensors = load_file(file)
    del tensors[LAYER]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LbrError, match=LAYER.removeprefix("model.")):
        read(folder)


PREFIXES = {
    "module.": lambda n: f"module.{n}",
    "_orig_mod.": lambda n: f"_orig_mod.{n}",
    "base_model.model.": lambda n: f"base_model.model.{n}",
    "two": lambda n: f"module._orig_mod.{n}",
    "encoder.": lambda n: f"my.own.encoder.{n}",
    "no model.": lambda n: n.removeprefix("model."),
    "model.model.": lambda n: f"model.{n}",
    "module. for model.": lambda n: f"module.{n.removeprefix('model.')}",
}


@pytest.mark.parametrize("read", [as_backbone, as_start, as_scored, as_miner, as_own])
@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes_are_mapped(
    sound: Path,
    tmp_path: Path,
    kind: str,
    read: Callable[[Path], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(sound, tmp_path / "as-it-was" / "raw")
    wanted = read(tmp_path / "as-it-was" / "raw")

    def rename(tensors: Tensors) -> None:
        named = {PREFIXES[kind](name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(named)

    folder, _ = damaged(sound, tmp_path, rename)
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        assert np.abs(read(folder) - wanted).max() <= 1e-6
    if read in (as_backbone, as_start):
        assert "of its tensor names is read as" in caplog.text


def test_names_are_fitted() -> None:
    found = fit(["a.b.w", "a.c.w", "head.w"], ["x.a.b.w", "x.a.c.w", "x.more.w"])
    assert found.stored == {"a.b.w": "x.a.b.w", "a.c.w": "x.a.c.w"}
    assert (found.missing, found.unexpected) == (["head.w"], ["x.more.w"])
    assert found.prefixes == [("x.", "")]
    assert common_prefix(["a.b.w"], ["q.r.s"]) == common_prefix([], ["x"]) == NO_PREFIX


def test_an_embedding_model_has_no_head(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved by AutoModel: no `model.` in front and no head, though it is not tied."""
    raw = tmp_path / "raw"
    AutoModel.from_pretrained(sound).save_pretrained(raw)
    AutoTokenizer.from_pretrained(sound).save_pretrained(raw)
    config = json.loads((raw / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        made = prepare(raw, tmp_path / "made")
    assert "holds no lm_head.weight (an embedding model?): stage 2 can train it" in caplog.text
    assert Card.load(made).head is False
    whole = prepare(sound, tmp_path / "whole")
    assert Card.load(whole).head is True
    texts = ["acute pain", "a cyst of the liver"]
    ours, theirs = (Encoder(str(f)).encode(texts, "query") for f in (made, whole))
    assert np.array_equal(ours, theirs)
    assert np.isfinite(as_scored(raw)).all()
    # A head that nothing trains is taken from where there is one.
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(sound))
    origin = Origin(raw, spare=sound)
    load_weights(model.named_parameters(), origin, ALONE, lambda *_, **__: torch.no_grad())
    for name, tensor in load_file(sound / SINGLE).items():
        assert torch.equal(model.get_parameter(name), tensor), name
    with pytest.raises(CheckpointError, match=r"1 tensor is missing \(lm_head.weight\)"):
        load_weights(model.named_parameters(), raw, ALONE, lambda *_, **__: torch.no_grad())


def test_a_tied_head_of_its_own_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """config.json says tied, and the file has another head all the same."""
    raw = backbone(tmp_path / "raw")
    tensors = load_file(raw / SINGLE)
    tensors[HEAD] = tensors[TABLE].clone()
    save_file(tensors, raw / SINGLE, metadata={"format": "pt"})
    made = prepare(raw, tmp_path / "equal")
    assert HEAD not in load_file(made / SINGLE)
    assert not caplog.records
    tensors[HEAD] *= 2
    save_file(tensors, raw / SINGLE, metadata={"format": "pt"})
    made = load_file(prepare(raw, tmp_path / "other") / SINGLE)
    rows = len(tensors[HEAD])
    assert torch.equal(made[HEAD][:rows], tensors[HEAD])
    assert torch.equal(made[TABLE][:rows], tensors[TABLE])
    assert "a head of its own" in caplog.text


def test_what_is_of_no_use_is_named(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def more(tensors: Tensors) -> None:
        tensors["value_head.weight"] = torch.zeros(1, 32)

    folder, _ = damaged(sound, tmp_path, more)
    as_backbone(folder)
    assert "1 tensor is not used by this model: value_head.weight" in caplog.text


def test_adapters_are_to_be_merged(sound: Path, tmp_path: Path) -> None:
    def more(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)

    folder, _ = damaged(sound, tmp_path, more)
    for read in (as_backbone, as_start, as_own):
        with pytest.raises(LbrError, match=r"adapters that are not merged .*merge_and_unload"):
            read(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds adapters .*merge_and_unload"):
        as_backbone(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_not_finite(dtype: torch.dtype) -> None:
    tensor = torch.zeros(40, 3, 2, dtype=dtype)
    assert not_finite("x", tensor) == ""
    for row in (0, 39):
        spoilt = tensor.clone()
        spoilt[row, 1, 1] = float("nan")
        assert not_finite("x", spoilt).endswith(f"in row {row}")
    assert not_finite("x", torch.zeros(0)) == not_finite("x", torch.ones(3, dtype=torch.int8)) == ""
    assert "row 0" in not_finite("x", torch.tensor(float("inf")))


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            512,
        ),
    ],
)
def test_positions(rope: dict[str, Any], wanted: int) -> None:
    config = LlamaConfig(max_position_embeddings=512, rope_parameters={"rope_theta": 1e4, **rope})
    assert positions(config) == wanted


@pytest.mark.parametrize(
    "shape",
    [
        {"max_position_embeddings": 16},
        {"family": "gpt2", "n_positions": 16, "max_position_embeddings": 16},
    ],
    ids=str,
)
def test_texts_longer_than_the_positions(tmp_path: Path, shape: dict[str, Any]) -> None:
    raw = backbone(tmp_path / "raw", **shape)
    with pytest.raises(
        ConfigError,
        match=r"model.max_length=32 tokens, but model.backbone=.* has "
        r"16 positions \(max_position_embeddings",
    ):
        prepare(raw, tmp_path / "made")
    made = prepare(raw, tmp_path / "made", max_length=16)
    card = Card.load(made)
    Card(card.num_bottleneck, 17, card.pooling, card.attention).save(made)
    (made / "files.json").unlink()
    with pytest.raises(ConfigError, match=r"max_length=17 tokens, but .* has 16 positions"):
        as_scored(made)


def test_no_end_token(sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(sound, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    made = prepare(folder, tmp_path / "made")
    assert AutoTokenizer.from_pretrained(made).eos_token == "</s>"
    assert "'</s>' of its config is used" in caplog.text
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        config["eos_token_id"] = None
        (folder / name).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"no end token \(eos\).*tokenizer_config.json"):
        prepare(folder, tmp_path / "made", max_length=31)
    # Encoding alone needs none.
    assert np.isfinite(as_scored(folder)).all()


@pytest.mark.parametrize("read", [as_scored, as_miner])
def test_no_pad_token(
    sound: Path, read: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As Qwen's first models: batches need one, and which one does not matter."""
    assert AutoTokenizer.from_pretrained(sound).pad_token is None
    texts = ["acute pain", "a cyst of the liver and of the kidney"]
    encoder = Encoder(str(sound))
    together = encoder.encode(texts, "document")
    alone = np.concatenate([encoder.encode([text], "document") for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    assert "has no pad token; batches are padded with '</s>'" in caplog.text
    assert np.isfinite(read(sound)).all()


def test_a_tokenizer_that_needs_sentencepiece(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(sound, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    # Only this module's view: transformers keeps what it has found for the whole process.
    absent = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(tokens, "importlib", absent)
    words = r"SentencePiece model \(tokenizer.model.*pip install 'lbr-ds\[sentencepiece\]'"
    for read in (as_backbone, as_scored, as_miner, as_own):
        with pytest.raises(EnvironmentProblem, match=words):
            read(folder)


def test_a_config_that_is_wrong(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    shutil.copytree(sound, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in (("num_attention_heads", 0), ("hidden_size", "x"), ("model_type", 3)):
        path.write_text(json.dumps({**config, key: value}))
        for read in (as_backbone, as_scored, as_miner, as_own):
            with pytest.raises(LbrError) as caught:
                read(folder)
            assert "\n" not in str(caught.value)
