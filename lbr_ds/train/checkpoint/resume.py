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
from lbr_ds.runs import fault, saved
from lbr_ds.shards import Manifest
from lbr_ds.system import environment
from lbr_ds.train.checkpoint import provenance
from lbr_ds.train.checkpoint.random_states import restore_random_states
from lbr_ds.train.checkpoint.writing import sweep
from lbr_ds.train.deepspeed.engine import Engine

log = logging.getLogger(__name__)


def find_checkpoint(
    run: RunConfig, stage: int, world: World, *, force: bool = False
) -> Path | None:
    """The checkpoint to go on from: the newest that is whole; None when there never was one.

    All ranks call it, before anything in the run folder is changed. Raises CheckpointError when
    none is whole, or that one was made by a recipe or from data that give other numbers; force
    accepts those.
    """
    folder = run.run / f"stage{stage}"
    if world.first:
        sweep(folder)
    world.barrier()
    found = newest_whole(folder, world)
    if found is not None:
        _check_fit(found, run, stage, world, force=force)
    return found


def load_checkpoint(found: Path | None, engine: Engine, world: World) -> dict[str, Any]:
    """Load the checkpoint that `find_checkpoint` returned and return its counters ({} for None).

    All ranks call it. Raises CheckpointError when the checkpoint cannot be loaded, for example
    after a change of ZeRO stage or precision.
    """
    if found is None:
        return {}
    facts = _facts_of(found)
    for key, now in (("zero_stage", engine.stage), ("dtype", str(engine.dtype))):
        if facts[key] != now:
            raise CheckpointError(
                f"{found} was saved with {key} {facts[key]} and engine.ds_config now gives {now}; "
                "use the ds_config of before"
            )
    if facts["world_size"] == world.size:
        engine.load_state(found / "state")
    else:
        log.info("%s: laid out for %d ranks, was %d", found, world.size, facts["world_size"])
        engine.load_reshaped(found / "state", found.with_suffix(".universal"))
    # Of more ranks than there were, some start from the same numbers: nothing in a step is drawn
    # from where they stand (dropout is seeded by the step).
    mine = found / "state" / f"random-{world.rank % facts['world_size']}.pt"
    restore_random_states(torch.load(mine, weights_only=True))
    counters: dict[str, Any] = facts["counters"]
    return counters


def newest_whole(stage_folder: Path, world: World) -> Path | None:
    """The newest checkpoint that is whole; see `first_whole`."""
    return first_whole(world.share(saved(stage_folder)[::-1]), world)


def first_whole(found: list[Path], world: World) -> Path | None:
    """The first checkpoint whose files are as they were saved; the ranks share the reading.

    Damaged ones are named in the log and passed over. Raises CheckpointError when all are.
    """
    for path in found:
        mine = fault(path, part=world.rank, parts=world.size)
        (finder,) = world.max(world.rank + 1 if mine else 0)
        if not finder:
            return Path(path)
        why = world.share(mine, source=int(finder) - 1)
        log.warning("%s is damaged and skipped: %s", path, why)
    if found:
        raise CheckpointError(
            f"{found[0].parent}: all {len(found)} checkpoints are damaged ({found[-1].name}: "
            f"{why}); restore one, or remove them to start from step 0"
        )
    return None


def _check_fit(found: Path, run: RunConfig, stage: int, world: World, *, force: bool) -> None:
    """Raises CheckpointError unless the checkpoint is of this recipe and data."""
    facts, reasons = _facts_of(found), []
    if world.share(world.first and provenance.same_backbone(run, found)):
        for key in ("backbone", "revision"):  # the same content may be at another place now
            facts["recipe"]["model"][key] = getattr(run.model, key)
    if changed := ", ".join(environment.differences(facts["recipe"], run.result_settings(stage))):
        reasons.append(f"was made by another recipe ({changed})")
    if facts["data"] != (data := provenance.fingerprint_of(Manifest.load(run.data.folder), stage)):
        reasons.append(
            f"was trained on data {facts['data'][:12]} and {run.data.folder} now holds {data[:12]}"
        )
    if reasons and not force:
        raise CheckpointError(
            f"{found} {' and '.join(reasons)}; undo the change, give a new run folder with "
            "run=..., or go on all the same with --force"
        )
    for reason in reasons:
        log.warning("--force: %s %s; going on all the same", found, reason)
    if other := ", ".join(environment.differences(facts["versions"], environment.versions())):
        log.warning("%s was made with other versions (%s); numbers may differ", found, other)


def _facts_of(found: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((found / "state.json").read_text(encoding="utf-8"))
    return facts
