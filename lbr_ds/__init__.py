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
    from lbr_ds.distributed import gather_with_gradient
    from lbr_ds.encoder import Encoder
    from lbr_ds.model.attention import packed_forward, use_ib_attention
    from lbr_ds.objectives.bag_of_words import bag_of_words_loss
    from lbr_ds.objectives.generative import ib_generative_loss
    from lbr_ds.objectives.info_nce import info_nce

__version__ = "0.2.0"
_MODULES = {
    "Encoder": "lbr_ds.encoder",
    "bag_of_words_loss": "lbr_ds.objectives.bag_of_words",
    "evaluate": "lbr_ds.api",
    "export": "lbr_ds.api",
    "gather_with_gradient": "lbr_ds.distributed",
    "ib_generative_loss": "lbr_ds.objectives.generative",
    "info_nce": "lbr_ds.objectives.info_nce",
    "load_recipe": "lbr_ds.api",
    "packed_forward": "lbr_ds.model.attention",
    "prepare": "lbr_ds.api",
    "train": "lbr_ds.api",
    "use_ib_attention": "lbr_ds.model.attention",
}
__all__ = [
    "Encoder",
    "__version__",
    "bag_of_words_loss",
    "evaluate",
    "export",
    "gather_with_gradient",
    "ib_generative_loss",
    "info_nce",
    "load_recipe",
    "packed_forward",
    "prepare",
    "train",
    "use_ib_attention",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
