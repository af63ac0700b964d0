"""A stage from start to end, noting how many loader processes there are before the engine.

`python -m tests.training.forks RECIPE OUT`, started by run_ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from lbr_ds.config import load
from lbr_ds.distributed import end, leave
from lbr_ds.training import loop, setup

if __name__ == "__main__":
    run, out = load(sys.argv[1], ["stage1.num_steps=2", "data.workers=2"]), Path(sys.argv[2])
    build_engine = setup.build_engine

    def noting(*args: Any, **options: Any) -> Any:
        forks = len(multiprocessing.active_children())
        (out / f"forks-{os.environ['RANK']}").write_text(str(forks))
        return build_engine(*args, **options)

    with mock.patch.object(setup, "build_engine", noting):
        loop.train(run, 1)
    leave()
    end(0)
