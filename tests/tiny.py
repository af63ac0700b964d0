"""A tiny run in a folder: random-weight backbone, made-up corpus, recipe. No network, seconds."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

if TYPE_CHECKING:
    from lbr_ds.config import RunConfig

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
OTHERS: dict[str, Any] = {"gpt2": GPT2Config}  # built otherwise, with other names

_SUBJECTS = ["liver", "heart", "lung", "kidney", "brain", "skin", "bone", "blood", "nerve", "eye"]
_FAULTS = ["pain", "fever", "swelling", "bleeding", "weakness", "infection", "stone", "cyst"]
_ADJECTIVES = ["acute", "chronic", "mild", "severe", "sudden", "recurrent", "hidden", "rare"]


def records(count: int, seed: int = 0, group_every: int = 0) -> list[dict[str, Any]]:
    """Pairs with texts of unequal lengths, some with a negative, all distinct.

    group_every n: record i belongs to group i // n.
    """
    rng = random.Random(seed)
    made = []
    for i in range(count):
        a, s, f = rng.choice(_ADJECTIVES), rng.choice(_SUBJECTS), rng.choice(_FAULTS)
        tail = " ".join(rng.choices(_SUBJECTS + _FAULTS, k=rng.randrange(1, 9)))
        made.append(
            {
                "id": f"r{i}",
                "source": "made-up",
                "query": f"what is {a} {f} of the {s} case {i}",
                "positives": [f"a {f} in the {s} that is {a}, number {i}, with {tail}"],
                "negatives": [f"the {rng.choice(_SUBJECTS)} {tail} other {i}"] * (i % 3 > 0),
                "group": f"g{i // group_every}" if group_every else "",
            }
        )
    return made


def backbone(folder: Path, family: str = "llama", **shape: Any) -> Path:
    """A random-weight causal LM with a byte-level BPE tokenizer, saved as a Hugging Face folder."""
    texts = [r["query"] + " " + r["positives"][0] for r in records(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {**FAMILIES, **OTHERS}[family](
        **{**SHAPE, **ids, "vocab_size": len(tokenizer), **shape}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_recipe(
    folder: Path, *, count: int = 240, group_every: int = 0, prepared: bool = True, **changes: Any
) -> Path:
    """Write backbone, corpus and recipe into `folder`; returns the recipe's path.

    changes: dotted keys with `__` for the dot (`stage1__num_steps=3`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps(r) + "\n" for r in records(count, group_every=group_every)]
    corpus.write_text("".join(lines))
    recipe: dict[str, Any] = {
        "name": "tiny",
        "run": str(folder / "run"),
        "model": {
            "backbone": str(backbone(folder / "backbone")),
            "max_length": 32,
            "activation_checkpointing": False,
            # LBR_TEST_COMPILE=on runs every test of training with compiled layers.
            "compile": {"on": True}.get(os.environ.get("LBR_TEST_COMPILE", ""), "auto"),
        },
        "bottleneck": {"count": 2},
        "data": {
            "folder": str(folder / "data"),
            "records_per_shard": 32,
            "workers": 0,
            "sources": [{"path": str(corpus), "name": "made-up"}],
            "splits": {"gl": 0.5, "cl": 0.3, "eval": 0.2},
        },
        "stage1": {
            "num_steps": 6,
            "samples_per_step": 8,
            "micro_batch_tokens": 256,
            "max_target_length": 32,
            "optim": {"lr": 1e-3},
        },
        "stage2": {
            "num_steps": 6,
            "samples_per_step": 8,
            "micro_batch_tokens": 2048,
            "num_negatives": 1,
            "temperature": 0.05,
            "optim": {"lr": 1e-3},
        },
        "engine": {"ds_config": "zero3_cpu"},
        "every": {"save": 3, "keep": 2},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = recipe
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    if prepared:
        from lbr_ds.config import load
        from lbr_ds.corpora.prepare import prepare

        run = load(path)
        prepare(run.data, run.seed)
    return path


def prepared_run(
    folder: Path, sources: list[dict[str, Any]], splits: dict[str, float], **sections: Any
) -> RunConfig:
    """The recipe of data prepared in `folder`, without a backbone; sections: further ones."""
    from lbr_ds.config import RunConfig
    from lbr_ds.corpora.prepare import prepare

    stage = {"num_steps": 2, "samples_per_step": 4, "optim": {"lr": 1e-3}}
    data = {
        "folder": folder / "data",
        "records_per_shard": 20,
        "sources": sources,
        "splits": splits,
    }
    raw = {"name": "toy", "run": folder / "run", "model": {"backbone": "none"}, "data": data}
    run = RunConfig.model_validate({**raw, "stage1": stage, "stage2": stage, **sections})
    prepare(run.data, run.seed)
    return run


def seal(checkpoint: Path, facts: dict[str, Any]) -> None:
    """A made-up checkpoint's state.json, and the manifest that says that it is whole."""
    text = json.dumps(facts).encode()
    (checkpoint / "state.json").write_bytes(text)
    listed = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (checkpoint / "files.json").write_text(json.dumps({"state.json": listed}))


def edit_manifest(data: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a prepared folder's manifest as one who writes it would: its own hash fits."""
    path = data / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    del raw["sha256"]
    raw["sha256"] = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(raw))
