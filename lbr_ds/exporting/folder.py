"""The files beside the weights that make a folder a sentence-transformers model.

The pooling and module files are written in the legacy form, which old and new readers accept
(vLLM #45995).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers import AutoConfig

from lbr_ds import lineage
from lbr_ds.instructions import Instructions
from lbr_ds.model.bottleneck import Card

log = logging.getLogger(__name__)
_MODULES = ("Transformer", "Pooling", "Normalize")


def write_dimensions(folder: Path) -> None:
    """Write the lengths to which vectors may be truncated to config.json, where vLLM reads them.

    vLLM then accepts `dimensions` in a request, for these lengths only, so the whole is one too.
    """
    made = lineage.load(folder)
    if made is None or not made.dimensions:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["matryoshka_dimensions"] = [_vector_size(folder), *made.dimensions]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_sentence_transformers(folder: Path, card: Card) -> None:
    """Write the files that make an exported folder a sentence-transformers model."""
    modules = []
    for index, name in enumerate(_MODULES):
        path = "" if index == 0 else f"{index}_{name}"
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": kind})
    pooling = {
        "word_embedding_dimension": _vector_size(folder),
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": card.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": card.pooling == "last",
        "include_prompt": card.pool_instruction or card.pooling != "mean",
    }
    general = {
        "__version__": {},
        "prompts": prompts(folder),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
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


def _vector_size(folder: Path) -> int:
    """Return the components of a vector, by whatever name config.json has them (GPT-2: n_embd)."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return int(config.get_text_config().hidden_size)


def prompts(folder: Path) -> dict[str, str]:
    """Return the prompts of `encode_query` and `encode_document`: the instructions of training.

    Where the sources have different ones, none is taken as a default: `query` (or `document`) is
    empty, and each instruction is there by its source's name. A warning says so.
    """
    used = Instructions.load(folder)
    if not used.any:
        return {}
    found = used.prompts()
    for side in used.unsettled():
        names = [name for name in found if name.startswith(f"{side}-")]
        beyond = f", and {used.more} records have others" if used.more else ""
        log.warning(
            "the sources have different instructions for the %s side, so encode_%s uses none by "
            "itself; give one with prompt_name (%s%s)",
            side,
            side,
            ", ".join(names),
            beyond,
        )
    return found
