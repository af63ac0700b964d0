"""A checkpoint -> a folder that transformers, sentence-transformers, MTEB and servers load as is.

With a fixed number of bottleneck tokens the model is "append K tokens, take the last state,
normalise": the tokenizer appends them, so no code of ours is needed to use it. The pooling and
module files are written in the legacy form, which old and new readers take (vLLM #45995).

Before the folder appears under its name, the same texts go through our own encoder and through
sentence-transformers, and the vectors must agree.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader

import lbr_ds
from lbr_ds import runs
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.encoder import PackedEncoder
from lbr_ds.model.trust import SAFE
from lbr_ds.model.widen import widen

TOLERANCE = 1e-5  # largest difference of a component, in fp32
_MODULES = ("Transformer", "Pooling", "Normalize")


def export(place: Path, out: Path) -> dict[str, Any]:
    """Export a run's newest checkpoint (or the given one) to `out`; returns parity.json's content.

    Raises ConfigError when `out` exists or stock tools cannot serve the model, CheckpointError when
    there is no checkpoint, a run has none but its backbone, or the vectors differ.
    """
    source = runs.model_folder(place)
    if source == place / "backbone":
        raise CheckpointError(f"{place} has trained nothing yet; export {source} if you mean that")
    card = Card.load(source)
    if card.attention != "causal":
        raise ConfigError(
            f"model.attention={card.attention}: stock tools would load it as causal; "
            "score this baseline with `lbr-ds eval RUN`"
        )
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; give a new folder")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    (part / "made_from.json").unlink(missing_ok=True)
    _write_sentence_transformers(part, card)
    parity = prove(part)
    if parity["largest_difference"] > TOLERANCE:
        raise CheckpointError(
            f"{part}: vectors differ from the trainer's own by {parity['largest_difference']:.2e} "
            f"(limit {TOLERANCE:.0e}); this is a fault of lbr-ds with this backbone, do not use it"
        )
    (part / "parity.json").write_text(json.dumps(parity, indent=2) + "\n")
    (part / "README.md").write_text(_model_card(place, part, card, parity), encoding="utf-8")
    for path in part.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # weights are saved for their owner only
    if out.exists():
        out.rmdir()
    part.rename(out)
    return parity


def _write_sentence_transformers(folder: Path, card: Card) -> None:
    """The files beside config.json and the weights that make it a sentence-transformers model."""
    config = json.loads((folder / "config.json").read_text())
    modules = []
    for index, name in enumerate(_MODULES):
        path = "" if index == 0 else f"{index}_{name}"
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": kind})
    pooling = {
        "word_embedding_dimension": config["hidden_size"],
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


def proof_texts(max_length: int) -> list[str]:
    """Short, empty, odd and overlong texts, around the maximum length in tokens."""
    lengths = (1, 2, max_length // 2, max_length - 6, max_length - 2, max_length, 3 * max_length)
    texts = [" ".join(["word"] * max(1, n)) for n in lengths]
    return [
        *texts,
        "",
        "A",
        "naive cafe\nwith a line break",
        "x" * (4 * max_length),
        "\u00e9\u03b2",
    ]


def prove(folder: Path) -> dict[str, Any]:
    """Encode the same texts by our encoder and by sentence-transformers, both in fp32.

    One after the other, on weights as they are stored: the host holds them once.
    """
    from sentence_transformers import SentenceTransformer

    card = Card.load(folder)
    texts = proof_texts(card.max_length)
    encoder = PackedEncoder(folder, device="cpu", dtype="auto")
    widen(encoder.model)
    ours = encoder.encode(texts)
    del encoder
    stock = SentenceTransformer(
        str(folder),
        device="cpu",
        model_kwargs={"dtype": "auto", **SAFE},
        local_files_only=True,
    )
    widen(stock)
    largest = {}
    for batch_size in (1, 3, len(texts)):  # alone, in mixed batches, all together
        theirs = stock.encode(texts, batch_size=batch_size, show_progress_bar=False)
        largest[str(batch_size)] = float(np.abs(theirs - ours).max())
    return {
        "texts": len(texts),
        "largest_difference": max(largest.values()),
        "by_batch_size": largest,
        "limit": TOLERANCE,
    }


def _model_card(place: Path, folder: Path, card: Card, parity: dict[str, Any]) -> str:
    """README.md of the export: what it is, how to use it, recipe, data, scores."""
    run = runs.run_of(place)
    facts: dict[str, Any] = {"recipe": None, "curation": None, "scores": {}}
    if run is not None:
        facts["recipe"] = (run / "recipe.yaml").read_text(encoding="utf-8")
        curation = Path(yaml.safe_load(facts["recipe"])["data"]["folder"]) / "curation.json"
        if curation.is_file():
            facts["curation"] = json.loads(curation.read_text(encoding="utf-8"))
        for path in sorted((run / "eval").glob("*.json")):
            facts["scores"][path.stem] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    config = json.loads((folder / "config.json").read_text())
    environment = Environment(loader=PackageLoader("lbr_ds", "templates"), trim_blocks=True)
    return environment.get_template("model_card.md").render(
        config=config, card=card, parity=parity, program=lbr_ds.__version__, **facts
    )
