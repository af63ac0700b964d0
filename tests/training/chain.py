"""Several trainings after one another, each from what one before it made.

`python -m tests.training.chain FOLDER`: FOLDER/plan.json is a list of ["train", recipe, stage,
overrides], ["export", run, out], ["replace", old, new, recipe, stage, overrides]: a training after
whose first step the folder `new` takes the place of the data folder `old` (`new.line` has the line
with which a verb refuses that), and ["refuse", file,
recipe, stage, overrides]: a training that must be refused, with the line that goes into `file`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lbr_ds.config import load
from lbr_ds.distributed import end, leave
from lbr_ds.errors import CheckpointError, EnvironmentProblem
from lbr_ds.exporting import export
from lbr_ds.shards.in_use import refuse_in_use
from lbr_ds.training import loop


def train(recipe: str, stage: int, overrides: list[str]) -> None:
    """One stage."""
    assert loop.train(load(recipe, overrides), stage)


def replace(old: str, new: str, recipe: str, stage: int, overrides: list[str]) -> None:
    """The same, and after the first step `new` is at the place of `old`."""
    step = loop.take_step

    def take_step(*arguments: Any) -> Any:
        values = step(*arguments)
        if Path(new).exists():
            try:
                refuse_in_use(Path(old))
            except EnvironmentProblem as error:
                Path(f"{new}.line").write_text(str(error))
            shutil.rmtree(old)
            Path(new).rename(old)
        return values

    loop.take_step = take_step
    train(recipe, stage, overrides)
    loop.take_step = step


def refuse(file: str, recipe: str, stage: int, overrides: list[str]) -> None:
    """The line with which the stage is refused."""
    try:
        loop.train(load(recipe, overrides), stage)
    except CheckpointError as error:
        Path(file).write_text(str(error))


if __name__ == "__main__":
    verbs = {
        "train": train,
        "replace": replace,
        "refuse": refuse,
        "export": lambda *places: export(*map(Path, places)),
    }
    for verb, *arguments in json.loads((Path(sys.argv[1]) / "plan.json").read_text()):
        verbs[verb](*arguments)
    leave()
    end(0)
