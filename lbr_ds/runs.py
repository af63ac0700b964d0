"""What lies where in a run folder. No torch: reports and job scripts ask too.

RUN/recipe.yaml environment.json backbone/ eval/*.json
RUN/stage1/ stage2/   metrics.jsonl evaluations.jsonl starts.jsonl tensorboard/ log/
                      checkpoints/step-000500/{state.json,files.json,state/,model/}

A checkpoint is whole when every file has the size and sha256 that its files.json says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_ds.errors import CheckpointError
from lbr_ds.locate import file_sha256

_PARTS = re.compile(r"\.|backbone|stage[12](/checkpoints(/step-\d+(/model)?)?)?")  # of a run
MANIFEST = "files.json"  # of a checkpoint: {name: {"bytes": size, "sha256": hex}}


def saved(stage_folder: Path) -> list[Path]:
    """Every checkpoint of `RUN/stageN` that was saved to its end, oldest first; whole or damaged.

    One still being written has another name (`.part`).
    """
    found = (stage_folder / "checkpoints").glob("step-*")
    named = (p for p in found if re.fullmatch(r"step-\d+", p.name))
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")))


def checkpoints(stage_folder: Path) -> list[Path]:
    """The checkpoints of `RUN/stageN` whose files are all there in full size, oldest first."""
    return [p for p in saved(stage_folder) if not fault(p, part=0, parts=0)]


def fault(checkpoint: Path, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint's files, as `name: reason`; empty when it is whole.

    Sizes are always compared. Contents are read (at the disk's or sha256's speed, whichever is
    less) and compared for every `parts`-th file from `part` on, so that ranks can share the
    reading; parts=0 reads none.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = [(name, int(is_["bytes"]), str(is_["sha256"])) for name, is_ in listed.items()]
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: not readable ({error})"
    if "state.json" not in listed:
        return f"{MANIFEST}: lists no state.json"
    try:
        for name, size, _ in files:
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name}: {found} bytes, {size} were saved"
        for name, _, digest in sorted(files)[part::parts] if parts else ():
            if file_sha256(checkpoint / name) != digest:
                return f"{name}: its contents have changed since it was saved (sha256)"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: not readable ({error.strerror})"
    return ""


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has seen."""
    return int(json.loads((checkpoint / "state.json").read_text())["step"])


def best_first(found: Sequence[Path]) -> list[Path]:
    """Those of `found` (checkpoints of a stage, oldest first) that were evaluated, the best first.

    By the Separation Ratio on held-out pairs that was measured as they were saved; of equals the
    newer first. Only those judged on a sample of the newest one's size can be compared.
    """
    judged: list[tuple[tuple[int, int], float, Path]] = []
    for path in reversed(found):
        figures = evaluation(path)
        if (ratio := figures.get("separation_ratio")) is not None:
            judged.append(((figures["queries"], figures["passages"]), ratio, path))
    alike = [(ratio, path) for sample, ratio, path in judged if sample == judged[0][0]]
    return [path for _, path in sorted(alike, key=lambda pair: -pair[0])]


def evaluation(checkpoint: Path) -> dict[str, Any]:
    """The figures of the evaluation before it was saved; {} without one, or if not readable."""
    try:
        facts = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        figures: dict[str, Any] = facts.get("evaluation") or {}
    except (OSError, ValueError, AttributeError):
        return {}
    return figures


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
    """The run folder that `place` is, or is a part of: a stage, a checkpoint, its model.

    A recipe.yaml in some other parent folder makes no run of it: None then.
    """
    for folder in (place, *place.resolve().parents):
        if (folder / "recipe.yaml").is_file():
            inside = place.resolve().relative_to(folder.resolve()).as_posix()
            parts = [(folder / name).is_dir() for name in ("backbone", "stage1", "stage2")]
            if any(parts) and _PARTS.fullmatch(inside):
                return folder
    return None
