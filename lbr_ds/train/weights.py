"""A folder's safetensors -> parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError


def load_weights(
    parameters: Iterable[tuple[str, nn.Parameter]], folder: Path, world: World,
    gathered: Callable[..., Any],
) -> None:  # fmt: skip
    """Fill parameters by name from a folder's safetensors, one tensor at a time.

    gathered(parameter, writer=0): where a sharded one is whole, and what rank 0 writes stays; rank
    0 then reads and the others receive their parts. Raises CheckpointError when a parameter has no
    tensor of its name and shape.
    """
    where = {key: file for file in sorted(folder.glob("*.safetensors")) for key in _keys(file)}
    for name, parameter in parameters:
        if name not in where:
            raise CheckpointError(f"{folder}: no tensor {name} in its safetensors files")
        sharded = hasattr(parameter, "ds_id")
        with gathered(parameter, writer=0), torch.no_grad():
            if sharded and not world.first:
                continue
            with safe_open(where[name], "pt") as file:
                tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                found, want = tuple(tensor.shape), tuple(parameter.shape)
                raise CheckpointError(f"{folder}: {name} has shape {found}, the model wants {want}")
            parameter.copy_(tensor)


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
