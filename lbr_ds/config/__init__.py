"""Recipes and ds_configs, each read strictly into one immutable, validated value. No torch import.

README.md describes how they work and lists the modules.
"""

from __future__ import annotations

from lbr_ds.config.data import CONTROL, SPLITS, DataConfig, SplitConfig
from lbr_ds.config.distillation import DistillationConfig
from lbr_ds.config.mining import MiningConfig
from lbr_ds.config.model import BottleneckConfig, LoraConfig, ModelConfig
from lbr_ds.config.objectives import OBJECTIVES
from lbr_ds.config.operation import CardConfig, GuardConfig
from lbr_ds.config.recipe import RunConfig, load
from lbr_ds.config.sources import ColumnsConfig, SourceConfig
from lbr_ds.config.stages import STAGES
from lbr_ds.config.training import OptimConfig

__all__ = [
    "CONTROL",
    "OBJECTIVES",
    "SPLITS",
    "STAGES",
    "BottleneckConfig",
    "CardConfig",
    "ColumnsConfig",
    "DataConfig",
    "DistillationConfig",
    "GuardConfig",
    "LoraConfig",
    "MiningConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SourceConfig",
    "SplitConfig",
    "load",
]
