"""Choose what a stage starts from, and stop a job that is requeued without making progress.

Every start of a stage writes a line to RUN/stageN/starts.jsonl, with what it started from.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import TrainingError
from lbr_ds.runs import (
    best_first,
    checkpoints,
    evaluation,
    model_folder,
    no_start,
    resolve_model,
    saved,
    step_of,
)
from lbr_ds.training.checkpoint.resume import first_complete

log = logging.getLogger(__name__)
_MAX_STARTS = 3  # of one SLURM job from the same step
NAME = "starts.jsonl"


def starting_point(run: RunConfig, number: int, world: World) -> Path:
    """Return the checkpoint or folder of weights that a stage starts from at step 0.

    All ranks call it. It is not needed once stage 2 has a checkpoint of its own.

    Raises:
        CheckpointError: It does not exist or is damaged, or no checkpoint of stage 1 is complete.
        ConfigError: A folder has no model.
    """
    source = run.stage2.start_from
    if number == 1 or source == "backbone":
        return run.run / "backbone"
    stage1 = run.run / "stage1"
    if source in ("best", "last"):
        newest = saved(stage1)[::-1]
        best = best_first(newest[::-1]) if source == "best" else []
        # The others follow, in case the best one is damaged.
        order = world.share(best + [path for path in newest if path not in best])
        if chosen := first_complete(order, world, state=False):
            log.info("stage 2 starts from %s (%s)", chosen, _why(chosen, source, len(best)))
            return chosen
    if source.isdigit():
        for path in checkpoints(stage1):
            if step_of(path) == int(source):
                return model_folder(path).parent  # raises for a damaged one
    elif source not in ("best", "last") and (folder := resolve_model(source).folder):
        return folder
    raise no_start(run.run, source)


def _why(chosen: Path, source: str, judged: int) -> str:
    ratio = evaluation(chosen).get("separation_ratio")
    if source == "last":
        return "the last"
    if ratio is None:
        return "the last: no complete one has been evaluated"
    return f"Separation Ratio {ratio:.3f}, the best of {judged} evaluated"


def note_start(folder: Path, step: int, origin: Path, world: World) -> None:
    """Record that the stage starts at `step`, from `origin`. All ranks call it.

    Only restarts of one SLURM job are counted: a new submission or a start by hand is always let
    through.

    Raises:
        TrainingError: On all ranks: this job has started at this step `_MAX_STARTS` times before,
            and each time it ended without a new checkpoint.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    looped = 0
    if world.first:
        path = folder / NAME
        if restart and path.exists():
            for line in reversed(path.read_text(encoding="utf-8").splitlines()):
                past = _parsed(line)
                if (past.get("job"), past.get("step")) != (job, step):
                    break
                looped += 1
        if looped < _MAX_STARTS:
            line = json.dumps(
                {
                    "step": step,
                    "from": str(origin),
                    "job": job,
                    "restart": restart,
                    "world": world.size,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                }
            )
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    looped = world.share(looped)
    if looped >= _MAX_STARTS:
        raise TrainingError(
            f"job {job} has started at step {step} {looped} times and never reached another "
            f"checkpoint ({folder / NAME}); find the cause in its output, then submit it again"
        )


def _parsed(line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError:  # incomplete: the process was killed while writing it
        return {}
    return entry if isinstance(entry, dict) else {}
