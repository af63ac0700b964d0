"""Compile the decoder layers of an engine, where DeepSpeed's hooks stay outside of the graphs."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from lbr_ds.model.compiled_layers import LayerCompiler, compile_layers
from lbr_ds.training.deepspeed.engine import Engine
from lbr_ds.training.deepspeed.library import deepspeed

log = logging.getLogger(__name__)

BACKEND = "LBR_COMPILE_BACKEND"  # environment variable: a backend of torch.compile, for tests


def compile_engine(engine: Engine, wanted: bool | str) -> LayerCompiler | None:
    """Compile the decoder layers of an engine as `model.compile` says.

    Under ZeRO-3 a layer must be a leaf module (`leaf_layers.py`): the modules of other layers have
    hooks of their own, which gather their parameters in the middle of the layer.

    Returns:
        The compiler; None where layers run eagerly.
    """
    if not wanted or (wanted == "auto" and engine.world.device.type != "cuda"):
        return None
    body: Any = engine.engine.module.backbone.base_model
    layers = getattr(body, "layers", ())
    if engine.stage == 3 and not all(deepspeed.utils.z3_leaf_module(layer) for layer in layers):
        log.warning(
            "model.compile: layers run eagerly, because ZeRO-3 gathers their modules one by one; "
            "a larger stage3_prefetch_bucket_size in the ds_config gathers whole layers"
        )
        return None
    # Dropout with torch's own generator, so that micro_batch's seeds hold (training/stages.py).
    inductor: Any = torch._inductor.config
    inductor.fallback_random = True
    return compile_layers(body, os.environ.get(BACKEND, "inductor"))
