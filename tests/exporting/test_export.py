"""Exported = trained: one vector from engine, our encoder, sentence-transformers and MTEB."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from lbr_ds.config import BottleneckConfig, ModelConfig, RunConfig
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.evaluation import evaluate
from lbr_ds.exporting import TOLERANCE, check_export, export, proof_texts
from lbr_ds.lineage import Bottleneck, Dataset, Lineage, Training
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from lbr_ds.runs import model_folder
from tests.ranks import run_ranks
from tests.tiny import backbone, records


@pytest.fixture(scope="module")
def exported(trained: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    export(trained.run, out)
    return out


@pytest.fixture(scope="module")
def texts(trained: RunConfig) -> list[str]:
    """Real ones, those around the maximum length, and written-out control tokens."""
    control = ["a <s> b </s>", "<|bottleneck_0|>", "c <|bottleneck_1|><s> d"]
    return [*proof_texts(trained.model.max_length), *(r["query"] for r in records(20)), *control]


def test_equals_the_engine_of_the_trainer(
    trained: RunConfig, exported: Path, texts: list[str], tmp_path: Path
) -> None:
    """The vectors of two ZeRO-3 ranks that resumed the checkpoint, against the export."""
    from sentence_transformers import SentenceTransformer

    (tmp_path / "texts.json").write_text(json.dumps(texts))
    recipe = trained.run / "recipe.yaml"
    run_ranks("tests.training.encode", 2, str(recipe), str(tmp_path))
    trainers_own = np.load(tmp_path / "vectors.npy")
    stock = SentenceTransformer(str(exported)).encode(texts, batch_size=5)
    assert np.abs(stock - trainers_own).max() <= TOLERANCE


def test_who_removes_white_space_around_a_text_is_recognised(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sentence-transformers did up to 5.2; any other difference is still found."""
    from sentence_transformers import SentenceTransformer

    encode = SentenceTransformer.encode
    assert check_export.main([str(exported)]) == 0
    assert "WHITE SPACE" not in capsys.readouterr().out

    def stripped(self: Any, texts: list[str], **options: Any) -> Any:
        return encode(self, [text.strip() for text in texts], **options)

    monkeypatch.setattr(SentenceTransformer, "encode", stripped)
    assert check_export.main([str(exported)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  WHITE SPACE REMOVED") == 1
    assert "This installation removes white space" in shown

    def shifted(self: Any, texts: list[str], **options: Any) -> Any:
        return encode(self, [f"{text}." for text in texts], **options)

    monkeypatch.setattr(SentenceTransformer, "encode", shifted)
    assert check_export.main([str(exported)]) == 1
    assert "WHITE SPACE" not in capsys.readouterr().out


def test_company_and_padding_do_not_matter(exported: Path, texts: list[str]) -> None:
    encoder = PackedEncoder(exported)
    together = encoder.encode(texts)
    for budget in (1, 50):
        assert np.abs(encoder.encode(texts, batch_tokens=budget) - together).max() <= TOLERANCE


def test_plain_transformers_gives_the_same(exported: Path, texts: list[str]) -> None:
    """Twelve lines that a user without sentence-transformers would write."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModel.from_pretrained(exported)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    vectors = torch.nn.functional.normalize(states[torch.arange(len(texts)), last], dim=-1)
    assert np.abs(vectors.numpy() - PackedEncoder(exported).encode(texts)).max() <= TOLERANCE


def test_generator_still_loads(exported: Path) -> None:
    """Nothing of the causal LM is missing or left over."""
    _, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_vectors_may_be_truncated_to_the_trained_lengths(
    trained: RunConfig, exported: Path, texts: list[str]
) -> None:
    """In config.json for vLLM, in the card, as sentence-transformers truncates, and scored."""
    from sentence_transformers import SentenceTransformer

    config = json.loads((exported / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [config["hidden_size"], 8, 4]
    assert "may be truncated to 8, 4 components" in (exported / "README.md").read_text()
    model = SentenceTransformer(str(exported), truncate_dim=4)
    short = PackedEncoder(exported).encode(texts)[:, :4]
    short /= np.linalg.norm(short, axis=1, keepdims=True)
    assert np.abs(model.encode(texts, normalize_embeddings=True) - short).max() <= TOLERANCE
    (scores,) = evaluate(str(exported), data=trained.data.folder)["tasks"].values()
    whole, *others = scores["compressed"]
    assert [row["dimensions"] for row in others] == [8, 4]
    assert whole["ndcg_at_10"] == pytest.approx(scores["ndcg_at_10"], abs=1e-5)


def test_legacy_files_for_servers(exported: Path, trained: RunConfig) -> None:
    pooling = json.loads((exported / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_lasttoken"] is True
    assert pooling["pooling_mode_mean_tokens"] is False
    types = [m["type"] for m in json.loads((exported / "modules.json").read_text())]
    assert types == [
        f"sentence_transformers.models.{n}" for n in ("Transformer", "Pooling", "Normalize")
    ]
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == trained.model.max_length
    assert "chat_template" not in tokenizer
    assert not (exported / "chat_template.jinja").exists()


def test_training_texts_travel_with_the_model(exported: Path, trained: RunConfig) -> None:
    assert (exported / trained_texts.NAME).read_bytes() == (
        trained.data.folder / trained_texts.NAME
    ).read_bytes()


def test_card_tells_recipe_data_and_proof(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for part in (
        "| gl | 120 |",
        "| cl | 72 |",
        "| eval | 48 |",
        "samples_per_step: 8",
        "training splits: 0",
        "Not scored yet",
    ):
        assert part in card


def test_mean_pooling_is_exported_too(trained: RunConfig, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(model_folder(trained.run), source)
    card = json.loads((source / "lbr.json").read_text())
    (source / "lbr.json").write_text(json.dumps({**card, "pooling": "mean"}))
    assert export(source, tmp_path / "out")["largest_difference"] <= TOLERANCE


def test_what_cannot_be_exported_is_refused(trained: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(tmp_path, tmp_path / "out")
    untrained = tmp_path / "untrained"
    (untrained / "backbone").mkdir(parents=True)
    (untrained / "backbone" / "lbr.json").touch()
    with pytest.raises(CheckpointError, match=r"no trained checkpoint; .* give .*backbone"):
        export(untrained, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not empty; give a new folder"):
        export(trained.run, tmp_path / "full")


@pytest.mark.parametrize("size", [3.3e38, 1e38])  # NaN, and zeros, since a norm is infinite
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, size: float) -> None:
    """Finite weights whose products overflow: NaN is neither above nor below a limit."""
    model = ModelConfig(backbone=str(backbone(tmp_path / "raw")), max_length=32)
    source = tmp_path / "model"
    prepare_backbone(model, BottleneckConfig(count=2), source, 0)
    (source / "files.json").unlink()
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], size)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the vector of 'the' is zero, not finite or"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("separator", ["eos", "none"])
def test_a_plain_backbone_is_read_at_its_last_token(
    tmp_path: Path, separator: Literal["eos", "none"]
) -> None:
    """By stock tools as by ours, and as transformers gives the states."""
    model = ModelConfig(backbone=str(backbone(tmp_path / "raw")), max_length=32)
    bottleneck = BottleneckConfig(count=0, separator=separator)
    prepare_backbone(model, bottleneck, tmp_path / "made", 0)
    assert export(tmp_path / "made", tmp_path / "out")["largest_difference"] <= TOLERANCE
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "raw").base_model
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "raw")
    ids = tokenizer("acute pain in the liver", add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if separator == "eos" else []
    with torch.inference_mode():
        state = stock(torch.tensor([ids])).last_hidden_state[0, -1]
    vector = Encoder(tmp_path / "out").encode_queries(["acute pain in the liver"])[0]
    np.testing.assert_allclose(vector, (state / state.norm()).numpy(), atol=1e-5)


def test_config_attributes_of_other_names(tmp_path: Path) -> None:
    """GPT-2's config.json has n_embd and no hidden_size; the model was trained on prefixes."""
    raw = backbone(tmp_path / "raw", "gpt2", hidden_size=24)
    model = ModelConfig(backbone=str(raw), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), tmp_path / "made", 0)
    data = Dataset(name="data", place="data", fingerprint="0", protocol="random", splits={"cl": 8})
    Lineage(
        backbones=(),
        bottleneck=Bottleneck(count=2, attention="causal", pooling="last", max_length=32),
        history=(Training(stage=2, split="cl", steps=1, samples=8, data=data, dimensions=(8, 4)),),
    ).save(tmp_path / "made")
    (tmp_path / "made" / "files.json").unlink()
    assert export(tmp_path / "made", tmp_path / "out")["largest_difference"] <= TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [24, 8, 4]
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 24
    assert "a vector of 24 numbers" in (tmp_path / "out" / "README.md").read_text()
