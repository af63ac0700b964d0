"""A recipe and a ds_config, each read strictly into one frozen, validated value. No torch import.

`recipe.py` holds the recipe's sections and rules, `data.py` the sections that describe raw corpora,
`ds_config.py` the memory layout for DeepSpeed, `validation.py` the text of validation errors.
`objectives.py` and `stages.py` are the tables of stage 1's objectives and of the two stages.
"""

from __future__ import annotations

from lbr_ds.config.data import SourceConfig, SplitConfig
from lbr_ds.config.objectives import OBJECTIVES
from lbr_ds.config.recipe import (
    CONTROL,
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
from lbr_ds.config.stages import STAGES

__all__ = [
    "CONTROL",
    "OBJECTIVES",
    "SPLITS",
    "STAGES",
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
