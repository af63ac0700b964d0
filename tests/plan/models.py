"""Tiny models of the families that the plan knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.tiny import FAMILIES, SHAPE

FAMILIES_AND_MORE: dict[str, Any] = {**FAMILIES, "qwen3": Qwen3Config}


def module(family: str, **changes: Any) -> torch.nn.Module:
    config = FAMILIES_AND_MORE[family](**{**SHAPE, "vocab_size": 384, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=changes.pop("dtype", torch.float32))
