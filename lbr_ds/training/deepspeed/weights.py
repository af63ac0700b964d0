"""Load a folder's safetensors into parameters, whole or sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.model.complete import fit, is_head, misfit, not_finite, report_prefixes, report_unused
from lbr_ds.model.files import Stored

log = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Where weights are loaded from.

    Attributes:
        folder: Has all weights.
        spare: Folder of a language-model head to use if `folder` has none and no head is trained.
    """

    folder: Path
    spare: Path | None


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def load_weights(
    parameters: Iterable[tuple[str, nn.Parameter]],
    origin: Path | Origin,
    world: World,
    gathered: Callable[..., Any],
) -> None:
    """Load parameters by name from a folder's safetensors, one at a time. All ranks call it.

    Args:
        parameters: Names and parameters to fill.
        origin: The folder, or an Origin.
        world: This rank's place.
        gathered: `gathered(parameter, writer=0)` is a context in which a sharded parameter is whole
            and what rank 0 writes is kept: rank 0 reads, and the others receive their shards.

    Raises:
        CheckpointError: On all ranks: a parameter has no tensor of its name and shape, or one that
            is not finite.
    """
    folder, spare = origin if isinstance(origin, Origin) else (origin, None)
    stored, wanted = Stored(folder), dict(parameters)
    match = fit(wanted, stored.names())
    stored.rename(match.stored)
    if spare and match.missing and all(is_head(name) for name in match.missing):
        log.info("%s has no language-model head; using that of %s", folder, spare)
        stored.add(Stored(spare), match.missing)
        match = replace(match, missing=[])
    shapes = {
        name: (stored.shape(name), shape_of(parameter))
        for name, parameter in wanted.items()
        if name in stored and stored.shape(name) != shape_of(parameter)
    }
    if fault := misfit(match.missing, match.unexpected, shapes):
        raise CheckpointError(
            f"{folder}: {fault}; the weights do not fit the recipe's backbone: set stage2.from to "
            "a model of the same architecture and size"
        )
    report_prefixes(str(folder), match.prefixes)
    report_unused(str(folder), match.unexpected)
    _check_values(stored, list(wanted), world)
    for name, parameter in wanted.items():
        sharded = hasattr(parameter, "ds_id")
        with gathered(parameter, writer=0), torch.no_grad():
            if world.first or not sharded:
                parameter.copy_(stored.read(name))


def _check_values(stored: Stored, names: list[str], world: World) -> None:
    """Raise CheckpointError on all ranks for a value that is not finite; each reads a share."""
    own = (not_finite(name, stored.read(name)) for name in names[world.rank :: world.size])
    fault = next((clause for clause in own if clause), "")
    (finder,) = world.max(world.rank + 1 if fault else 0)
    if finder:
        fault = world.share(fault, source=int(finder) - 1)
        raise CheckpointError(
            f"{stored.folder}: {fault}; restore the weights from a copy, or, if the training "
            "diverged, use an earlier checkpoint"
        )
