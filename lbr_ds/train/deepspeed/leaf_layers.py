"""Which modules ZeRO-3 gathers in one go: decoder layers, where the ds_config has room for one.

DeepSpeed gathers module by module, so a layer is some seven gathers, and with activation
checkpointing its linear maps are gathered for the second forward and again for their backward. A
layer that is marked as a *leaf module* is gathered whole at its start, once each way, and reduces
its gradients at its end; its inner modules bear no hooks. The numbers are the same.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from lbr_ds.config.ds_config import Layout


def by_layer(backbone: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """The `zero_optimization` of a ds_config, with the backbone's layers as leaf modules.

    Unchanged where a layer is larger than the prefetch bucket (see Layout.by_layer), and where the
    file names leaf modules of its own.
    """
    zero: dict[str, Any] = layout.config["zero_optimization"]
    names = set(backbone._no_split_modules or ())
    layers = [module for module in backbone.modules() if type(module).__name__ in names]
    sizes = [sum(getattr(p, "ds_numel", p.numel()) for p in m.parameters()) for m in layers]
    if not layers or not layout.by_layer(max(sizes)) or "leaf_module" in zero:
        return zero
    return {**zero, "leaf_module": {"classes": sorted(names)}}
