"""The attention kernels of a run: measured by rank 0, the same on every rank and after a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.model.attention_calibration import Heads, calibrate
from lbr_ds.model.attention_costs import Cost, Kernels
from lbr_ds.system.atomic import write_json
from lbr_ds.system.failures import writing

log = logging.getLogger(__name__)

COSTS = "attention_costs.json"  # in the run folder


def attention_kernels(run: RunConfig, dtype: torch.dtype, world: World) -> Kernels:
    """Return the attention kernels of a run. All ranks call it.

    Costs are kept in the run folder, for the device that they were measured on: with others a
    resumed run might choose other kernels, and its results would differ in their rounding.

    Args:
        run: The recipe; the prepared backbone is in its run folder.
        dtype: Of the weights.
        world: This rank's place.
    """
    config = AutoConfig.from_pretrained(
        run.run / "backbone", trust_remote_code=run.model.trust_remote_code
    )
    heads, wanted, file = Heads.of(config), run.model.attention_kernel, run.run / COSTS
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    key = f"{name}, torch {torch.__version__}, {dtype}, {heads}, {wanted}"
    stored = world.share(_read(file).get(key) if world.first else None)
    if stored is not None:
        return Kernels({kernel: Cost(*cost) for kernel, cost in stored.items()})
    kernels: Kernels = world.share(calibrate(world.device, dtype, heads, wanted))
    if world.first and len(kernels.costs) > 1:
        with writing(run.run):
            write_json(file, {**_read(file), key: dict(kernels.costs)}, indent=2)
    return kernels


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        log.warning("%s is damaged; attention is measured again", file)
        return {}
    return found
