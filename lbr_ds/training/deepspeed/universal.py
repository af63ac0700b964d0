"""Convert a checkpoint's state to DeepSpeed's universal format, for any number of ranks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lbr_ds.system import children
from lbr_ds.training.deepspeed.library import read_state


def to_universal(folder: Path, out: Path) -> str:
    """Convert one tag of a DeepSpeed checkpoint; return what failed, or "".

    The converter runs in a process of its own because it forks workers, which a rank with
    communication threads must not do. It unpickles the files, so they are checked before.
    """
    for file in sorted(folder.glob("*.pt")):
        try:
            read_state(file, mmap=True)  # without reading the tensors
        except UnpicklingError as error:
            return str(error)
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


def repair_loaded(optimizer: Any, groups: list[dict[str, Any]], device: torch.device) -> None:
    """Correct what DeepSpeed 0.19.8's universal load gets wrong under ZeRO-3.

    It gives every parameter group the options of the first one, weight decay among them, and all
    states the same step tensor, which Adam then increments once for each of them.

    Args:
        optimizer: The optimizer after the load.
        groups: The options of its parameter groups before the load.
        device: This rank's device.
    """
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            fused = device.type == "cuda" and parameter.is_cuda
            where = parameter.device if fused else torch.device("cpu")
            state["step"] = state["step"].to(where, copy=True)
