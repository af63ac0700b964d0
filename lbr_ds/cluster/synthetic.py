"""Random weights of a backbone's shape and random token ids, for measurements without real data."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lbr_ds.config import RunConfig
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.model.bottleneck import Card
from lbr_ds.plan.shape import Shape


def random_ids(count: int, vocab: int) -> list[int]:
    """Return `count` random token ids."""
    return torch.randint(vocab, (count,)).tolist()


def write_backbone(shape: Shape, run: RunConfig, folder: Path) -> None:
    """Write random bf16 weights of a shape as a prepared backbone's folder, without a tokenizer.

    Raises:
        EnvironmentProblem: the disk has no room for them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(folder).free, 2 * shape.total
    if free < need:
        raise EnvironmentProblem(
            f"{folder}: {free / 1e9:.1f} GB free, {need / 1e9:.1f} needed for weights of this "
            "shape; make room, or take a larger disk (--out of `bench cluster`)"
        )
    options = {k: v for k, v in shape.config.items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(shape.config["model_type"], **options)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    card = Card(run.bottleneck.count, run.model.max_length, run.model.pooling, run.model.attention)
    card.save(folder)
