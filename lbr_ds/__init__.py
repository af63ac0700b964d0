"""LBR-DS: Learn Before Represent on DeepSpeed.

The names below are the public Python API. They are imported when they are first used, so that
`import lbr_ds` loads neither torch nor any other heavy library, and `plan`, `report` and `--help`
are quick on a login node.

    import lbr_ds

    recipe = lbr_ds.load_recipe("demo", ["run=runs/demo", "data.folder=data/icd10cm"])
    lbr_ds.prepare(recipe)
    lbr_ds.train(recipe, stage=1, nproc=2)
    lbr_ds.train(recipe, stage=2, nproc=2)
    vectors = lbr_ds.Encoder("runs/demo").encode_queries(["heart attack"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbr_ds.api import evaluate, export, load_recipe, prepare, train
    from lbr_ds.evaluate import Encoder
    from lbr_ds.objectives import info_nce

__version__ = "0.2.0"
__all__ = [
    "Encoder",
    "__version__",
    "evaluate",
    "export",
    "info_nce",
    "load_recipe",
    "prepare",
    "train",
]
_MODULES = {"Encoder": "lbr_ds.evaluate", "info_nce": "lbr_ds.objectives"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "lbr_ds.api")), name)


def __dir__() -> list[str]:
    """List the public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
