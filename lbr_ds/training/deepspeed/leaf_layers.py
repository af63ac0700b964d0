"""Gather whole decoder layers under ZeRO-3, where the ds_config has room for one.

DeepSpeed gathers module by module, so a layer takes about seven gathers, and with activation
checkpointing its linear modules are gathered for the second forward and again for their backward. A
layer marked as a *leaf module* is gathered whole, once in each direction, and its gradients are
reduced once; its inner modules have no hooks. The results are the same.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lbr_ds.config.ds_config import Layout


def by_layer(backbone: PreTrainedModel, layout: Layout, zero: dict[str, Any]) -> dict[str, Any]:
    """Return `zero`, a layout's `zero_optimization`, with the backbone's layers as leaf modules.

    It is unchanged where a layer is larger than the prefetch bucket (see Layout.by_layer), and
    where the ds_config names leaf modules of its own.
    """
    names = set(backbone._no_split_modules or ())
    layers = [module for module in backbone.modules() if type(module).__name__ in names]
    sizes = [sum(getattr(p, "ds_numel", p.numel()) for p in m.parameters()) for m in layers]
    if not layers or not layout.by_layer(max(sizes)) or "leaf_module" in zero:
        return zero
    return {**zero, "leaf_module": {"classes": sorted(names)}}
