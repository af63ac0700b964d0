"""A folder's safetensors -> parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.model.files import Stored


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def load_weights(
    parameters: Iterable[tuple[str, nn.Parameter]], folder: Path, world: World,
    gathered: Callable[..., Any],
) -> None:  # fmt: skip
    """Fill parameters by name from a folder's safetensors, one tensor at a time.

    gathered(parameter, writer=0): where a sharded one is whole, and what rank 0 writes stays; rank
    0 then reads and the others receive their parts. Raises CheckpointError when a parameter has no
    tensor of its name and shape.
    """
    stored = Stored(folder)
    for name, parameter in parameters:
        if name not in stored:
            raise CheckpointError(f"{folder}: no tensor {name} in its safetensors files")
        found, want = stored.shape(name), shape_of(parameter)
        if found != want:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(found)}, the model wants {tuple(want)}"
            )
        sharded = hasattr(parameter, "ds_id")
        with gathered(parameter, writer=0), torch.no_grad():
            if world.first or not sharded:
                parameter.copy_(stored.read(name))
