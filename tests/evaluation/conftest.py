"""A tiny corpus, an encoder with fixed vectors, and a sentence-transformers folder."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from lbr_ds.records import Record


class FixedVectors(AbsEncoder):
    """A text's vector is drawn by its hash: no model, yet never the same score twice."""

    def __init__(self, width: int = 16) -> None:
        self.width = width
        self.calls: list[str] = []
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={"name": "test/fixed", "similarity_fn_name": ScoringFunction.COSINE}
        )

    def vector(self, text: str) -> np.ndarray:
        """(width,) of unit length."""
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        drawn = np.random.default_rng(seed).normal(size=self.width)
        return drawn / np.linalg.norm(drawn)

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        """(N, width) float32."""
        texts = [text for batch in inputs for text in batch["text"]]
        self.calls += texts
        return np.stack([self.vector(text) for text in texts]).astype(np.float32)


@pytest.fixture
def encoder() -> FixedVectors:
    """An encoder that mteb accepts."""
    return FixedVectors()


@pytest.fixture
def records() -> list[Record]:
    """40 queries over 70 passages; some have two answers, some share a question or a passage."""
    made = [
        Record(
            id=f"q{n}",
            source="made-up",
            query=f"question {n}",
            instruction="Find: " if n % 3 == 0 else "",
            positives=[f"answer {n}"] + ([f"second answer {n}"] if n % 4 == 0 else []),
            negatives=[f"not the answer {n % 20}"],
            group=f"g{n}",
        )
        for n in range(38)
    ]
    # The same question twice in one group: either answer is right for both.
    for n, answer in enumerate(["one use", "another use"]):
        made.append(
            Record(
                id=f"use{n}",
                source="made-up",
                query="Use of  it" if n else "use of it",
                positives=[answer],
                group="it",
            )
        )
    return made


@pytest.fixture
def data(tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder whose eval split reads as `records`."""
    folder = tmp_path / "corpus"
    folder.mkdir()

    def read_split(where: Path, split: str, **_: Any) -> Any:
        assert (where, split) == (folder, "eval")
        return iter(records)

    manifest = types.SimpleNamespace(protocol="random", beside=lambda name: None)
    plain = types.SimpleNamespace(load=lambda where: manifest)
    fake = types.SimpleNamespace(read_split=read_split, Manifest=plain)
    monkeypatch.setitem(sys.modules, "lbr_ds.shards", fake)
    return folder


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder with random weights, built without a network."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "question", "answer", "not", "the", "second", "use", "of", "it"]
    words += [str(n) for n in range(40)]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(plain)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(plain)
    folder = tmp_path_factory.mktemp("sentence") / "model"
    SentenceTransformer(modules=[Transformer(str(plain)), Pooling(16)]).save(str(folder))
    return folder
