"""The files beside the weights that make a folder a sentence-transformers model.

The pooling and module files are written in the legacy form, which old and new readers take
(vLLM #45995).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lbr_ds.model.bottleneck import Card

_MODULES = ("Transformer", "Pooling", "Normalize")


def write_sentence_transformers(folder: Path, card: Card) -> None:
    """The files beside config.json and the weights that make it a sentence-transformers model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    modules = []
    for index, name in enumerate(_MODULES):
        path = "" if index == 0 else f"{index}_{name}"
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": kind})
    pooling = {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": card.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": card.pooling == "last",
        "include_prompt": True,
    }
    general: dict[str, Any] = {"__version__": {}, "prompts": {}, "default_prompt_name": None,
               "similarity_fn_name": "cosine"}  # fmt: skip
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = card.max_length
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": card.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": general,
        "tokenizer_config.json": tokenizer,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
