"""A tokenizer that is a SentencePiece model alone, read with the package of the extra."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lbr_ds.config.recipe import BottleneckConfig, ModelConfig
from lbr_ds.model.bottleneck import prepare_backbone
from tests.tiny import backbone, records

sentencepiece = pytest.importorskip("sentencepiece", reason="needs lbr-ds[sentencepiece]")


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """The prepared backbone has its ids, and a tokenizer.json that needs the package no more."""
    texts = [record["query"] for record in records(200)]
    (tmp_path / "texts").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"),
        model_prefix=str(tmp_path / "pieces"),
        model_type="bpe",  # as Llama's, with all that follows
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    folder = backbone(tmp_path / "raw")
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "pieces.model", folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    prepared = tmp_path / "prepared"
    model = ModelConfig(backbone=str(folder), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), prepared, 0)
    assert not (prepared / "tokenizer.model").exists()
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    for text in [*texts[:50], "caf\u00e9 \u809d", "two  blanks "]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == original.encode(text), text
