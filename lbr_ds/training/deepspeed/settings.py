"""What DeepSpeed is given: its configuration and the optimizer."""

from __future__ import annotations

from typing import Any

import torch

from lbr_ds.config import OptimConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.training.deepspeed.extensions import wait_for_compiler
from lbr_ds.training.deepspeed.library import deepspeed


def ds_config(layout: layouts.Layout, optim: OptimConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the layout, and what the recipe and this program decide."""
    config = {
        **layout.config,
        "train_micro_batch_size_per_gpu": 1,  # micro-batches are filled by tokens, not by rows
        "gradient_accumulation_steps": 1,  # and their number differs: see backward(last=)
        "gradient_clipping": optim.clip,
        "steps_per_print": 1_000_000_000,
    }
    if layout.width == 2:  # ZeRO-1 and 2 would let a non-finite update through without it
        config["bf16"] = {**layout.config["bf16"], "check_grad_overflow": True}
    if layout.stage == 3:  # see ShardedLinear
        config["zero_optimization"] = {
            **layout.config["zero_optimization"],
            "memory_efficient_linear": False,
        }
    return config


def optimizer(
    groups: list[dict[str, Any]], layout: layouts.Layout, optim: OptimConfig
) -> torch.optim.Optimizer:
    """Return AdamW: torch's fused one, or DeepSpeed's where the optimizer is offloaded.

    The fused one takes a sixth of the time, on a CPU too.
    """
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if layout.offload_optimizer:
        wait_for_compiler("cpu_adam")
        try:
            return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        except Exception as error:  # of many kinds: it is compiled at its first use
            why = str(error).splitlines()[0]
            raise EnvironmentProblem(f"offload_optimizer needs g++ and ninja: {why}") from None
    return torch.optim.AdamW(groups, fused=True, **options)
