"""A folder, a run, a checkpoint or a model's name -> retrieval scores. The only door for mteb.

    evaluate("runs/demo", data=Path("data/icd10cm"), output=Path("runs/demo/eval/stage2.json"))
    evaluate("sentence-transformers/all-MiniLM-L6-v2", tasks=["NFCorpus"])

Our own held-out split is judged by mteb's own retrieval task, so its numbers and those of the
official tasks come from one ruler. This room never imports `train`.

`geometry.py` and `bootstrap.py` need numpy alone; so the names below are imported when they are
first used, and mteb and torch with them.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from lbr_ds.system.locate import cache_folder

if TYPE_CHECKING:
    from lbr_ds.evaluate.models import PackedModel, load_model
    from lbr_ds.evaluate.run import evaluate, judge, top_passages
    from lbr_ds.evaluate.tasks import (
        HeldOutTask,
        held_out_task,
        held_out_tasks,
        official_tasks,
        split_names,
    )

# mteb 2.26 makes its result cache when it is imported; keep it out of the user's home.
os.environ.setdefault("MTEB_CACHE", str(cache_folder() / "mteb"))

__all__ = [
    "HeldOutTask",
    "PackedModel",
    "evaluate",
    "held_out_task",
    "held_out_tasks",
    "judge",
    "load_model",
    "official_tasks",
    "split_names",
    "top_passages",
]
_HOMES = {
    "PackedModel": "models",
    "load_model": "models",
    "evaluate": "run",
    "judge": "run",
    "top_passages": "run",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'tasks')}"), name)
