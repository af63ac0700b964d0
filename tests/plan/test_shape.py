"""Parameters that are counted from a config.json, against real modules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_ds.config import load
from lbr_ds.errors import ConfigError
from lbr_ds.plan.shape import (
    find_shape,
    known_backbones,
    shape_of_config,
)
from lbr_ds.system import resources
from tests.plan.models import FAMILIES_AND_MORE, module


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES_AND_MORE)
@pytest.mark.parametrize(
    "extra", [{}, {"head_dim": 16}, {"attention_bias": True, "mlp_bias": True}]
)
def test_parameters_are_those_of_the_real_module(
    family: str, tied: bool, extra: dict[str, Any], tmp_path: Path
) -> None:
    """From the config.json that transformers writes; every tensor's shape, not only the sum."""
    model = module(family, tie_word_embeddings=tied, **extra)
    model.config.save_pretrained(tmp_path)
    shape = shape_of_config(json.loads((tmp_path / "config.json").read_text()), family)
    real = sorted(tuple(p.shape) for p in model.parameters())
    assert sorted(shape.tensors) == real
    assert shape.total == sum(math.prod(s) for s in real)
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert shape.body == linear


def test_bundled_shapes_have_the_published_counts() -> None:
    for name, entry in known_backbones().items():
        assert shape_of_config(entry["config"], name).total == entry["parameters"], name


def test_every_shipped_recipe_can_be_planned_without_a_network() -> None:
    for path in resources.shipped_folder("recipes").glob("*.yaml"):
        run = load(path)
        shape = find_shape(run.model, run.bottleneck.count)
        assert shape.layers == (run.model.num_layers or shape.layers)


def test_unknown_build_is_refused() -> None:
    with pytest.raises(ConfigError, match="gpt2"):
        shape_of_config({"model_type": "gpt2"}, "gpt2")
