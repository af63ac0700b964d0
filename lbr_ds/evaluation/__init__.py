"""Score models on held-out data and on official MTEB tasks. The only door for mteb.

    evaluate("runs/demo", data=Path("data/icd10cm"), output=Path("runs/demo/eval/stage2.json"))
    evaluate("sentence-transformers/all-MiniLM-L6-v2", tasks=["NFCorpus"])

The held-out split is scored by mteb's own retrieval task, so its numbers and those of official
tasks are measured alike. This room never imports `train`. `geometry.py`, `bootstrap.py` and
`judgements.py` do not import mteb; the names below are imported at their first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from lbr_ds.system.locate import cache_folder

if TYPE_CHECKING:
    from lbr_ds.evaluation.evaluation import EvalOptions, evaluate
    from lbr_ds.evaluation.models import OwnModel, load_model
    from lbr_ds.evaluation.scoring import score_task
    from lbr_ds.evaluation.tasks import (
        HeldOutTask,
        held_out_tasks,
        official_tasks,
        split_names,
    )

# mteb 2.26 creates its result cache when it is imported; keep it out of the user's home.
os.environ.setdefault("MTEB_CACHE", str(cache_folder() / "mteb"))

__all__ = [
    "EvalOptions",
    "HeldOutTask",
    "OwnModel",
    "evaluate",
    "held_out_tasks",
    "load_model",
    "official_tasks",
    "score_task",
    "split_names",
]
_MODULES = {
    "EvalOptions": "evaluation",
    "OwnModel": "models",
    "evaluate": "evaluation",
    "load_model": "models",
    "score_task": "scoring",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'tasks')}"), name)
