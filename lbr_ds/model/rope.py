"""Rotary position embeddings (RoPE) in the keys of transformers 4, beside those of transformers 5.

transformers 5 saves `rope_parameters` alone. transformers 4 does not know that key and falls back
to its default base of 10000 without an error, and so do the programs built on it: short texts get
slightly wrong vectors, long ones worthless vectors. Every config.json that this package writes
therefore has both. transformers 5 prefers the old keys if they exist, so both must agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # of transformers 4.57
_NAMES = ("rope_theta", "partial_rotary_factor", "rope_type", "type")  # not part of a scaling
# Models that give the base and the rotated share of a head other names.
_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_OTHER_NAMES = {"gpt_neox": _NEOX, "gpt_neox_japanese": _NEOX}
# The key for the base of layers with sliding windows; None: all layers have the one base.
_LOCAL_BASE = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "olmo3": None,
}
# Models whose configuration takes these keys of a scaling and refuses any more.
_ONLY = {"phi3": ("short_factor", "long_factor"), "olmo": ("factor",), "olmo2": ("factor",)}
_OTHERWISE = ("nemotron", "phimoe")  # their scaling is ignored, or another function of the length


def write_legacy_rope(folder: Path) -> str:
    """Add the keys of transformers 4 to a model folder's config.json.

    Returns:
        What transformers 4 has no key for; empty when it reads the same positions.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    keys, lacks = legacy_rope(config)
    path.write_text(json.dumps({**config, **keys}, indent=2) + "\n", encoding="utf-8")
    return lacks


def legacy_rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Express `rope_parameters` of a config.json in the keys of transformers 4.

    Args:
        config: The content of config.json.

    Returns:
        The keys to add, and what transformers 4 has no key for: empty when it reads the model, or
        when the model has no rotary positions. A scaling that it has no key for is written all the
        same, because transformers 4 then refuses the model instead of ignoring the scaling.
    """
    parameters = config.get("rope_parameters")
    if not parameters:
        return {}, ""
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return _per_layer_type(config, parameters)
    return _flat(config, parameters)


def _flat(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the keys for a form that applies to all layers."""
    model = config["model_type"]
    found = {key: value for key, value in parameters.items() if value is not None}
    kind = found.get("rope_type", found.get("type", "default"))
    scaling = {key: value for key, value in found.items() if key not in _NAMES}
    keys: dict[str, Any] = {name: found[name] for name in _NAMES[:2] if name in found}
    for name, other in _OTHER_NAMES.get(model, {}).items():
        if name in keys:
            keys[other] = keys[name]
    if kind == "default" and not scaling:
        return {**keys, "rope_scaling": None}, ""
    longest: int = config.get("max_position_embeddings", 0)
    original: int = scaling.get("original_max_position_embeddings", longest)
    if kind == "yarn" and "factor" not in scaling:
        scaling["factor"] = longest / original
    if kind == "longrope":
        keys["original_max_position_embeddings"] = original
        scaling = _longrope(scaling, original, longest / original)
    only = _ONLY.get(model)
    if only is not None and scaling.keys() - keys.keys() == set(only):
        return {**keys, "rope_scaling": {"type": kind, **{key: scaling[key] for key in only}}}, ""
    lacks = ""
    if kind not in _TYPES or (kind == "default" and scaling):
        lacks = (
            f"rope_type {kind!r} with {', '.join(scaling)}" if scaling else f"rope_type {kind!r}"
        )
    elif only is not None or model in _OTHERWISE:
        lacks = f"rope_type {kind!r} of {model} with {', '.join(scaling)}"
    return {**keys, "rope_scaling": {"rope_type": kind, "type": kind, **scaling}}, lacks


def _longrope(scaling: dict[str, Any], original: int, ratio: float) -> dict[str, Any]:
    """Return the scaling for transformers 4, which takes `ratio` (of lengths) for the factor."""
    factor = scaling.get("factor", ratio)
    if factor == ratio:
        return {key: value for key, value in scaling.items() if key != "factor"}
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"attention_factor": grown, **scaling}


def _per_layer_type(
    config: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return the keys where layers with sliding windows have a form of their own; all or none."""
    model = config["model_type"]
    local, whole = parameters.get("sliding_attention"), parameters.get("full_attention")
    if model not in _LOCAL_BASE or not local or not whole or len(parameters) > 2:
        return {}, f"a form for each type of layer of {model}"
    (keys, lacks), (local_keys, _) = _flat(config, whole), _flat(config, local)
    if local_keys["rope_scaling"] is not None:
        return {}, "a scaling of the layers with sliding windows"
    if (name := _LOCAL_BASE[model]) is not None:
        return {**keys, name: local["rope_theta"]}, lacks
    if local["rope_theta"] != whole["rope_theta"]:
        return {}, "a rope_theta of its own for the layers with sliding windows"
    return keys, lacks
