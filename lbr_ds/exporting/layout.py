"""The names under which an exported folder has its weights.

Embedding servers expect the base model: `LlamaModel`, its tensors without the prefix `model.`, and
no language-model head, which would only cost memory. Training and generation want the generator.
Every reader of ours takes both, by the mapping of names in `lbr_ds/model/complete.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lbr_ds.errors import CheckpointError
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.complete import fit, misfit
from lbr_ds.model.files import Stored, in_files, save_files, save_index


def write_weights(source: Path, folder: Path, *, causal_lm: bool) -> None:
    """Write the weights of `source` under the names of an exported folder.

    Args:
        source: A model folder of ours, in either layout.
        folder: Where config.json and lbr.json are already; both are adapted.
        causal_lm: Whether to write the generator instead of the base model.

    Raises:
        CheckpointError: A tensor is missing, such as the head of a folder that has none.
    """
    with torch.device("meta"), no_init_weights():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        generator = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, trust_remote_code=False
        )
    generator.tie_weights()
    module = generator if causal_lm else generator.base_model
    stored, card = Stored(source), Card.load(source)
    wanted = dict(module.named_parameters())
    found = fit(wanted, stored.names())
    stored.rename(found.stored)
    shapes = {
        name: (stored.shape(name), parameter.shape)
        for name, parameter in wanted.items()
        if name in stored and stored.shape(name) != parameter.shape
    }
    if fault := misfit(found.missing, found.unexpected, shapes):
        raise CheckpointError(f"{source}: {fault}; give a complete copy of the model")
    if causal_lm and not card.head:
        raise CheckpointError(
            f"--causal-lm: {source} has no language-model head; export a checkpoint whose backbone "
            "has one, or export without --causal-lm"
        )
    files = in_files({name: p.numel() * p.itemsize for name, p in wanted.items()})
    save_files(files, stored.read, folder)
    save_index(files, folder)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described["architectures"] = [type(module).__name__]
    if not causal_lm and not described.get("tie_word_embeddings"):
        # A reader that builds the generator all the same gets the embeddings for its head, not
        # random numbers, and lbr.json says that it cannot write.
        described["tie_word_embeddings"] = True
        replace(card, head=False).save(folder)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
