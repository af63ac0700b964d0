"""What lies where in a run folder. No torch: reports and job scripts ask too.

RUN/recipe.yaml environment.json backbone/ eval/*.json
RUN/stage1/ stage2/   metrics.jsonl tensorboard/ log/ checkpoints/step-000500/{state,model}/
"""

from __future__ import annotations

import json
from pathlib import Path

from lbr_ds.errors import CheckpointError


def checkpoints(stage_folder: Path) -> list[Path]:
    """The whole checkpoints of `RUN/stageN`, oldest first; one still being written is none."""
    found = (stage_folder / "checkpoints").glob("step-*")
    return sorted(p for p in found if p.suffix != ".part" and (p / "state.json").is_file())


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has seen."""
    return int(json.loads((checkpoint / "state.json").read_text())["step"])


def model_folder(place: Path) -> Path:
    """The weights folder that `place` means.

    A run: the newest checkpoint of stage 2, else of stage 1, else the prepared backbone. A stage:
    its newest checkpoint. A checkpoint: its model. A weights folder: itself. Raises
    CheckpointError when there is none.
    """
    if not place.exists():
        raise CheckpointError(
            f"{place}: no such folder; give a run, a checkpoint or a model folder"
        )
    if (place / "lbr.json").is_file():
        return place
    if (place / "state.json").is_file():
        return place / "model"
    for stage in (place, place / "stage2", place / "stage1"):
        if found := checkpoints(stage):
            return found[-1] / "model"
    if (place / "backbone" / "lbr.json").is_file():
        return place / "backbone"
    raise CheckpointError(f"{place} holds no checkpoint; run `lbr-ds train` first")


def run_of(place: Path) -> Path | None:
    """The run folder that `place` (a run, a checkpoint, its model) lies in, if any."""
    for folder in (place, *place.resolve().parents):
        if (folder / "recipe.yaml").is_file():
            return folder
    return None
