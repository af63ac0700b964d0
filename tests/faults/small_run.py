"""A run that is small enough to start hundreds of times: random weights and texts, real tars."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.prepare import prepare

_RECORDS = 320
_WORDS = [
    a + b
    for a in ("ba", "de", "ki", "lo", "mu", "ra", "so", "ti")
    for b in ("n", "lt", "rk", "sh", "m", "pp", "st", "v")
]
_LAYERS = 2


def small_run(folder: Path, *, width: int = 32, **stage: Any) -> RunConfig:
    """Write backbone, corpus, shards and recipe into `folder`, with `stage`'s keys in both stages.

    The recipe is `folder`/recipe.yaml, the run folder `folder`/run. A byte is a token, so a step of
    8 samples is two or more micro-batches on each of two ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_backbone(folder / "backbone", width)
    _write_corpus(folder / "corpus.jsonl")
    both = {"samples_per_step": 8, "micro_batch_tokens": 160, "optim": {"lr": 1e-3}, **stage}
    recipe = {
        "name": "small",
        "run": str(folder / "run"),
        "model": {
            "backbone": str(folder / "backbone"),
            "max_length": 48,
            "activation_checkpointing": False,
        },
        "bottleneck": {"count": 2},
        "data": {
            "folder": str(folder / "data"),
            "records_per_shard": 32,
            "workers": 0,
            "sources": [{"path": str(folder / "corpus.jsonl"), "name": "made-up"}],
            "splits": {"gl": 0.5, "cl": 0.4, "eval": 0.1},
        },
        "stage1": {**both, "max_target_length": 48},
        "stage2": {**both, "from": "backbone", "temperature": 0.05},
        "engine": {"ds_config": "zero3_cpu"},
        "every": {"evaluate": None},  # the campaign checks saves and steps
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    run = load(path)
    prepare(run.data, run.seed)
    return run


def _write_corpus(path: Path) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(_RECORDS):
            query, answer = (draw.choices(_WORDS, k=draw.randint(2, 6)) for _ in range(2))
            raw = {
                "id": f"r{number}",
                "query": f"{number} {' '.join(query)}",
                "positives": [f"{' '.join(answer)} {number}"],
            }
            file.write(json.dumps(raw) + "\n")


def _write_backbone(folder: Path, width: int) -> None:
    """A random Llama of `width` dimensions whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
