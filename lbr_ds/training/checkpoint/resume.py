"""Find the checkpoint to resume from, check that it fits the run, and load it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.lineage import fingerprint_of
from lbr_ds.runs import fault, saved
from lbr_ds.shards import Manifest
from lbr_ds.system import environment
from lbr_ds.training.checkpoint import provenance
from lbr_ds.training.checkpoint.random_states import restore_random_states
from lbr_ds.training.checkpoint.writing import sweep
from lbr_ds.training.deepspeed.engine import Engine

log = logging.getLogger(__name__)


def find_checkpoint(
    run: RunConfig, stage: int, world: World, *, force: bool = False
) -> Path | None:
    """Return the checkpoint to resume from, the newest complete one; None if there is none.

    All ranks call it, before anything in the run folder is changed.

    Raises:
        CheckpointError: None is complete; or, without `force`, the newest one was made with a
            recipe or data that give different results.
    """
    folder = run.run / f"stage{stage}"
    if world.first:
        sweep(folder)
    world.barrier()
    checkpoint = newest_complete(folder, world)
    if checkpoint is not None:
        _check_fit(checkpoint, run, stage, world, force=force)
    return checkpoint


def load_checkpoint(checkpoint: Path | None, engine: Engine, world: World) -> dict[str, Any]:
    """Load the checkpoint that `find_checkpoint` returned and return its counters ({} for None).

    All ranks call it.

    Raises:
        CheckpointError: It cannot be loaded, for example after a change of ZeRO stage or precision.
    """
    if checkpoint is None:
        return {}
    facts = _facts_of(checkpoint)
    for key, now in (("zero_stage", engine.stage), ("dtype", str(engine.dtype))):
        if facts[key] != now:
            raise CheckpointError(
                f"{checkpoint} was saved with {key} {facts[key]} and engine.ds_config now "
                f"gives {now}; use the earlier ds_config"
            )
    if facts["world_size"] == world.size:
        engine.load_state(checkpoint / "state")
    else:
        log.info("%s: converting from %d to %d ranks", checkpoint, facts["world_size"], world.size)
        engine.load_reshaped(checkpoint / "state", checkpoint.with_suffix(".universal"))
    # With more ranks than before, some start from equal random states: no step draws from them
    # (dropout is seeded by the step).
    mine = checkpoint / "state" / f"random-{world.rank % facts['world_size']}.pt"
    restore_random_states(torch.load(mine, weights_only=True))
    counters: dict[str, Any] = facts["counters"]
    return counters


def newest_complete(stage_folder: Path, world: World) -> Path | None:
    """Return the newest complete checkpoint; see `first_complete`."""
    return first_complete(world.share(saved(stage_folder)[::-1]), world)


def first_complete(checkpoints: list[Path], world: World, *, state: bool = True) -> Path | None:
    """Return the first checkpoint whose files are as they were saved; each rank reads a share.

    Damaged ones are logged and skipped.

    Args:
        checkpoints: In the order of preference.
        world: This rank's place.
        state: Whether `state/` is needed, for a resume.

    Raises:
        CheckpointError: All are damaged.
    """
    for path in checkpoints:
        mine = fault(path, part=world.rank, parts=world.size, state=state)
        (finder,) = world.max(world.rank + 1 if mine else 0)
        if not finder:
            return Path(path)
        why = world.share(mine, source=int(finder) - 1)
        log.warning("%s is damaged and skipped: %s", path, why)
    if checkpoints:
        raise CheckpointError(
            f"{checkpoints[0].parent}: all {len(checkpoints)} checkpoints are damaged "
            f"({checkpoints[-1].name}: {why}); restore one, or remove them to start from step 0"
        )
    return None


def _check_fit(checkpoint: Path, run: RunConfig, stage: int, world: World, *, force: bool) -> None:
    """Raise CheckpointError unless the checkpoint was made with this recipe and data."""
    facts, reasons = _facts_of(checkpoint), []
    if world.share(world.first and provenance.same_backbone(run, checkpoint)):
        for key in ("backbone", "revision"):  # the same content may be in another place now
            facts["recipe"]["model"][key] = getattr(run.model, key)
    if changed := ", ".join(environment.differences(facts["recipe"], run.result_settings(stage))):
        reasons.append(f"was made with another recipe ({changed})")
    if facts["data"] != (data := fingerprint_of(Manifest.load(run.data.folder), stage)):
        reasons.append(
            f"was trained on data {facts['data'][:12]} and {run.data.folder} now holds {data[:12]}"
        )
    if reasons and not force:
        raise CheckpointError(
            f"{checkpoint} {' and '.join(reasons)}; undo the change, give a new run folder with "
            "run=..., or resume nevertheless with --force"
        )
    for reason in reasons:
        log.warning("--force: %s %s; resuming nevertheless", checkpoint, reason)
    if other := ", ".join(environment.differences(facts["versions"], environment.versions())):
        log.warning("%s was made with other versions (%s); results may differ", checkpoint, other)


def _facts_of(checkpoint: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return facts
