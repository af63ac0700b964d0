"""Optimizer parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from lbr_ds.config import OptimConfig

_TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "rows.difference")


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether weight decay applies: to matrices, except embeddings and the head."""
    return len(shape) >= 2 and not any(table in name for table in _TABLES)


def parameter_groups(
    shapes: dict[str, tuple[int, ...]], parameters: dict[str, Any], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Return the optimizer's groups, with and without weight decay; empty ones are omitted."""
    groups = []
    for wanted, decay in ((True, optim.weight_decay), (False, 0.0)):
        chosen = [parameters[n] for n, shape in shapes.items() if decays(n, shape) is wanted]
        if chosen:
            groups.append({"params": chosen, "weight_decay": decay})
    return groups


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then cosine decay to the minimum."""
    warmup = round(optim.warmup_ratio * num_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
