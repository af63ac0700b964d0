"""A recipe and a ds_config, each read strictly into one frozen, validated value. No torch import.

`recipe.py` holds the recipe's sections and rules, `data.py` the sections that describe raw corpora,
`ds_config.py` the memory layout for DeepSpeed, `validation.py` the text of validation errors.
"""

from __future__ import annotations

from lbr_ds.config.data import SourceConfig, SplitConfig
from lbr_ds.config.recipe import (
    CONTROL,
    OBJECTIVES,
    PLAIN,
    SPLITS,
    BottleneckConfig,
    DataConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    load,
)

__all__ = [
    "CONTROL",
    "OBJECTIVES",
    "PLAIN",
    "SPLITS",
    "BottleneckConfig",
    "DataConfig",
    "GuardConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "SplitConfig",
    "load",
]
