"""A job that is requeued again and again without getting anywhere stops.

Every start of a stage leaves a line in RUN/stageN/starts.jsonl.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from lbr_ds.distributed import World
from lbr_ds.errors import TrainingError

_SAME = 3  # starts of a job from one step: one may be bad luck, two a coincidence
NAME = "starts.jsonl"


def note_start(folder: Path, step: int, world: World) -> None:
    """Write down that the stage begins at `step`. All ranks call it.

    Raises TrainingError, on all ranks, when this SLURM job has begun there `_SAME` times before:
    each time it ended with no new checkpoint. Who submits it anew, or starts it by hand, gets
    through: only the restarts of one job count.
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
        if looped < _SAME:
            line = json.dumps({"step": step, "job": job, "restart": restart, "world": world.size,
                               "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})  # fmt: skip
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    looped = world.share(looped)
    if looped >= _SAME:
        raise TrainingError(
            f"job {job} has begun at step {step} {looped} times and never reached another "
            f"checkpoint ({folder / NAME}); find out why in its output, then submit it anew"
        )


def _parsed(line: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except ValueError:  # cut short by a kill
        return {}
    return found if isinstance(found, dict) else {}
