"""The prepared backbone: tokens appended to every text, rows sound, spare rows used first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.errors import ConfigError
from lbr_ds.model import backbone as opening
from lbr_ds.model import files
from lbr_ds.model.bottleneck import bottleneck_token, load_tokenizer, prepare_backbone
from tests.tiny import backbone


def prepared(tmp_path: Path, count: int = 3, **shape: object) -> Path:
    config = ModelConfig(backbone=str(backbone(tmp_path / "raw", **shape)), max_length=16)
    prepare_backbone(config, BottleneckConfig(count=count), tmp_path / "made", seed=0)
    return tmp_path / "made"


@pytest.mark.parametrize("text", ["", "a fever", "acute pain in the liver " * 50])
def test_every_text_ends_in_the_whole_bottleneck(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(prepared(tmp_path))
    ids = tokenizer(text, truncation=True, max_length=16)["input_ids"]
    wanted = tokenizer.convert_tokens_to_ids([bottleneck_token(i) for i in range(3)])
    assert ids[-3:] == wanted
    assert len(ids) <= 16
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[:-3] == plain[:13]


def unigram(folder: Path) -> None:
    """Give a backbone the tokenizer of another family: its vocabulary holds its control tokens."""
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["<s>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    model.train_from_iterator(["a fever is heat", "the <b> a of /s tag |_0"] * 50, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("family", ["bpe", "unigram"])
def test_no_text_can_make_a_control_token(tmp_path: Path, family: str) -> None:
    """However it is written; and all other texts keep the ids that the backbone knows."""
    raw = backbone(tmp_path / "raw")
    if family == "unigram":
        unigram(raw)
    untouched = AutoTokenizer.from_pretrained(raw)
    prepare_backbone(ModelConfig(backbone=str(raw)), BottleneckConfig(count=2), tmp_path / "m", 0)
    tokenizer = load_tokenizer(tmp_path / "m")
    special = {*tokenizer.all_special_ids, *tokenizer("")["input_ids"]}
    for name in ["<s>", "</s>", "<unk>", "<|bottleneck_0|>", "<|bottleneck_1|>"]:
        for text in (name, f"a {name} b", f"a{name}b", name * 3):
            assert not special - {tokenizer.unk_token_id} & set(
                tokenizer(text, add_special_tokens=False)["input_ids"]
            )
    for text in ("a fever is heat", "the <b> tag of a < s > /s", ""):
        assert tokenizer(text)["input_ids"][:-2] == untouched(text)["input_ids"]


def test_without_bottleneck_the_end_token_is_appended(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepared(tmp_path, count=0))
    assert tokenizer("a fever")["input_ids"][-1] == tokenizer.eos_token_id


def test_rows_start_near_the_mean_and_differ(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    raw = AutoModelForCausalLM.from_pretrained(tmp_path / "raw").get_input_embeddings().weight
    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    size = len(raw)
    assert torch.equal(table[:size], raw)
    rows = table[size : size + 3]
    assert not torch.equal(rows[0], rows[1])
    assert (rows - raw.mean(0)).abs().max() < raw.std(0).max()


def test_spare_rows_are_used_before_the_table_grows(tmp_path: Path) -> None:
    folder = prepared(tmp_path, vocab_size=480)
    assert len(AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight) == 480


def test_untied_head_gets_its_rows_too(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(prepared(tmp_path, tie_word_embeddings=False))
    first = load_tokenizer(tmp_path / "made").convert_tokens_to_ids(bottleneck_token(0))
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert len(head) == len(table)
    assert not torch.equal(head[first], table[first])
    assert head[first].norm() < 2 * head[:first].norm(dim=1).mean()


CHANGES: list[dict[str, object]] = [
    {},
    {"tie_word_embeddings": False},
    {"vocab_size": 480},
    {"family": "qwen2"},
    {"family": "mistral", "tie_word_embeddings": False},
]


@pytest.mark.parametrize("shape", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copied_file_by_file_as_if_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, object], dtype: torch.dtype
) -> None:
    """From several files to several files; the oracle is transformers' own loading and saving."""
    raw = backbone(tmp_path / "raw", **{"num_hidden_layers": 3, **shape})
    loaded = AutoModelForCausalLM.from_pretrained(raw, dtype=dtype)
    (raw / "model.safetensors").unlink()
    loaded.save_pretrained(raw, max_shard_size="20KB")
    assert len(list(raw.glob("*.safetensors"))) > 2
    config = ModelConfig(backbone=str(raw), max_length=16, num_layers=2)

    def made(name: str) -> Path:
        prepare_backbone(config, BottleneckConfig(count=3), tmp_path / name, seed=1)
        return tmp_path / name

    monkeypatch.setattr(files, "FILE_BYTES", 20_000)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "from_pretrained", None)  # would load it whole
        copied = made("copied")
    assert len(list(copied.glob("*.safetensors"))) > 2
    monkeypatch.setattr(opening, "_without_weights", lambda *names: None)
    whole = made("whole")
    named = {path.name for path in whole.iterdir()} - {"model.safetensors", "files.json"}
    for name in named:
        assert (copied / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = map(AutoModelForCausalLM.from_pretrained, (copied, whole))
    assert ours.dtype == theirs.dtype == dtype
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_same_seed_same_bytes_and_an_equal_one_is_kept(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    weights = folder / "model.safetensors"
    before, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    prepare_backbone(
        ModelConfig(backbone=str(tmp_path / "raw"), max_length=16),
        BottleneckConfig(count=3),
        folder,
        seed=0,
    )
    assert weights.stat().st_mtime_ns == stamp
    (folder / "made_from.json").unlink()
    prepare_backbone(
        ModelConfig(backbone=str(tmp_path / "raw"), max_length=16),
        BottleneckConfig(count=3),
        folder,
        seed=0,
    )
    assert weights.read_bytes() == before


def test_too_many_layers_and_an_unknown_backbone_are_refused(tmp_path: Path) -> None:
    raw = str(backbone(tmp_path / "raw"))
    with pytest.raises(ConfigError, match="num_layers=9, but the backbone has 2"):
        prepare_backbone(
            ModelConfig(backbone=raw, num_layers=9), BottleneckConfig(), tmp_path / "x", 0
        )
    with pytest.raises(ConfigError, match=r"holds no \.safetensors file"):
        prepare_backbone(ModelConfig(backbone=str(tmp_path)), BottleneckConfig(), tmp_path / "x", 0)
