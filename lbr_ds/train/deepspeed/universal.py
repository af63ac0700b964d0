"""A checkpoint's state -> DeepSpeed's universal format, which any number of ranks can load."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbr_ds.system import children


def to_universal(folder: Path, out: Path) -> str:
    """Convert one tag of a DeepSpeed checkpoint, in a process of its own; returns what failed.

    The converter forks workers, which a rank with its communication threads must not.
    """
    workers = str(min(8, os.cpu_count() or 1))
    command = children.following_command(
        [
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--inject_missing_state",
            "--input_folder",
            str(folder),
            "--output_folder",
            str(out),
            "--num_extract_workers",
            workers,
            "--num_merge_workers",
            workers,
        ]
    )
    done = subprocess.run(command, env=children.environment(), capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def mend(optimizer: Any, groups: list[dict[str, Any]], device: torch.device) -> None:
    """What DeepSpeed 0.19.8's universal load gets wrong under ZeRO-3; groups: the options before.

    It gives every parameter group the first one's options, weight decay among them, and all states
    one and the same step tensor, which Adam then counts up once for each of them.
    """
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            fused = device.type == "cuda" and parameter.is_cuda
            where = parameter.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(where, copy=True)
