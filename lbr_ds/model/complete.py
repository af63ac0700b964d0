"""Check that a model folder is complete: every tensor is present, has its shape, and is finite.

transformers fills a tensor that a file lacks with random numbers and reports it in a log message.
Here a folder whose tensors do not fit the model is refused with one line, wherever a model is read:

- `fit` compares the names in the files' headers with those of a module on the meta device, and maps
  a prefix that all of them have in addition or lack (`module.`, `base_model.model.`);
- `complete` is a context in which every `from_pretrained`, whichever library calls it, is compared
  by transformers' own loading report, and its values are checked;
- `check_positions` and `check_finite` are the parts that are used alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lbr_ds.errors import CheckpointError, ConfigError, LbrError
from lbr_ds.model.trust import SAFE, no_pickles, replaced, why_not

log = logging.getLogger(__name__)
NO_PREFIX = ("", "")
_SHOWN = 3  # names in a message
_ROW_CHUNK = 1 << 24  # numbers that are looked at together
# A layer that BERT's masked-LM files lack, and that no pooling of token states reads.
_UNUSED = re.compile(r"(^|\.)pooler\.")
_HEAD = re.compile(r"(\w+\.)*(lm_head|embed_out|cls|predictions|score|classifier)\.")


@dataclass(frozen=True)
class Fit:
    """How the tensor names of a folder fit those that a model expects.

    Attributes:
        stored: expected name -> name in the folder's files.
        missing: expected names that have no tensor.
        unexpected: names in the files that the model has no use for.
        prefixes: (old, new) where names in the files begin otherwise; empty if they fit.
    """

    stored: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    prefixes: list[tuple[str, str]]


def fit(expected: Iterable[str], names: Iterable[str]) -> Fit:
    """Match the names of a model's tensors with those in a folder's files.

    Equal names match. For the others the change of prefix is applied that makes most of them equal,
    and so on for the rest (the head may have another prefix).
    """
    there, wanted = dict.fromkeys(names), list(expected)
    stored = {name: name for name in wanted if name in there}
    missing = [name for name in wanted if name not in stored]
    left = [name for name in there if name not in stored]
    prefixes: list[tuple[str, str]] = []
    while (prefix := common_prefix(missing, left)) != NO_PREFIX:
        prefixes.append(prefix)
        found = renamed(left, prefix)
        stored |= {name: found[name] for name in missing if name in found}
        used = set(stored.values())
        missing = [name for name in missing if name not in stored]
        left = [name for name in left if name not in used]
    return Fit(stored, missing, left, prefixes)


def renamed(names: Iterable[str], prefix: tuple[str, str]) -> dict[str, str]:
    """Return {name with the new prefix: name in the file} for the names with the old prefix."""
    old, new = prefix
    return {new + name[len(old) :]: name for name in names if name.startswith(old)}


def common_prefix(missing: list[str], left: list[str]) -> tuple[str, str]:
    """Return (old, new), the change of prefix that turns most of `left` into names of `missing`.

    NO_PREFIX where there is none.
    """
    wanted, best, most = set(missing), NO_PREFIX, 0
    by_end: dict[str, list[str]] = {}
    for name in left:
        by_end.setdefault(_end(name), []).append(name)
    # One name is not enough, because it may belong to the head, which may have no counterpart.
    for name in {missing[0], missing[len(missing) // 2], missing[-1]} if missing else ():
        candidates = {_without_common_end(other, name) for other in by_end.get(_end(name), ())}
        for candidate in sorted(candidates, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
            count = len(wanted & renamed(left, candidate).keys())
            if count > most:
                best, most = candidate, count
    return best


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _without_common_end(old: str, new: str) -> tuple[str, str]:
    """Return what precedes the parts, between dots, in which two names end alike."""
    a, b = old.split("."), new.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop(), b.pop()
    return "".join(f"{part}." for part in a), "".join(f"{part}." for part in b)


def misfit(
    missing: Iterable[str], unexpected: Iterable[str], shapes: Mapping[str, tuple[Any, Any]]
) -> str:
    """Return what is wrong with a folder's tensors, in one clause; empty if nothing is.

    Args:
        missing: expected names without a tensor.
        unexpected: names that the model has no use for: no fault by themselves.
        shapes: name -> (shape found, shape expected), where they differ.
    """
    faults = []
    if named := sorted(missing):
        faults.append(f"{_count(named, 'tensor is', 'tensors are')} missing ({_some(named)})")
    if shapes:
        bad = [f"{n} is {tuple(a)}, expected {tuple(b)}" for n, (a, b) in sorted(shapes.items())]
        faults.append(f"{_count(bad, 'tensor has', 'tensors have')} a wrong shape ({_some(bad)})")
    if faults and (left := sorted(unexpected)):
        faults.append(f"{_count(left, 'is', 'are')} not expected ({_some(left)})")
    return "; ".join(faults)


def _count(found: list[str], one: str, many: str) -> str:
    return f"{len(found)} {one if len(found) == 1 else many}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def report_prefixes(place: str, prefixes: Iterable[tuple[str, str]]) -> None:
    """Log that tensors are read under other names than the files have."""
    for prefix in prefixes:
        log.warning("%s: the prefix %r of its tensor names is read as %r", place, *prefix)


def report_unused(place: str, names: Iterable[str]) -> None:
    """Log which tensors of a folder are not used. Raises CheckpointError for adapters.

    The weights below adapters are not the model's own before they are merged.
    """
    left = sorted(names)
    if adapters := [name for name in left if ".lora_" in name or ".lokr_" in name]:
        raise CheckpointError(
            f"{place}: holds adapters that are not merged into the weights ({_some(adapters)}); "
            "merge them first (peft: merge_and_unload)"
        )
    if left:
        count = _count(left, "tensor is", "tensors are")
        log.warning("%s: %s not used by this model: %s", place, count, _some(left))


def not_finite(name: str, tensor: Tensor) -> str:
    """Return where a tensor contains NaN or infinity, in one clause; empty if all is finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return ""
    if tensor.itemsize == 1:  # float8 has neither of the functions below
        tensor = tensor.to(torch.bfloat16)
    if all(bool(torch.isfinite(edge)) for edge in torch.aminmax(tensor)):  # NaN is passed on
        return ""
    rows = tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
    step = max(1, _ROW_CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        bad = (~torch.isfinite(rows[start : start + step])).any(1).nonzero()
        if len(bad):
            row = start + int(bad[0])
            return f"tensor {name} holds a value that is not finite (NaN or infinite) in row {row}"
    raise AssertionError(name)


def check_finite(place: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError that names the first tensor, and its row, with NaN or infinity."""
    for name, tensor in tensors:
        if fault := not_finite(name, tensor):
            raise CheckpointError(f"{place}: {fault}; take an undamaged copy of the model")


@contextmanager
def complete(place: str) -> Iterator[None]:
    """Refuse models with a tensor that is missing, misshapen or not finite, while entered.

    This holds for every library that loads a model through transformers. Names that only lack or
    have a prefix are mapped, with a log line; transformers maps its own prefix (`model.`) itself.

    Args:
        place: the folder or name, for the message.

    Raises:
        CheckpointError: a model is not complete; it names `place` and the tensors.
    """
    load = vars(PreTrainedModel)["from_pretrained"].__func__

    def checked(cls: Any, *args: Any, **options: Any) -> Any:
        asked = options.pop("output_loading_info", False)
        # Else wrong shapes end in an error that only points at a log message.
        options = {**options, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = load(cls, *args, **options)
        missing, left = _counted(info), sorted(info["unexpected_keys"])
        if (prefix := common_prefix(missing, left)) != NO_PREFIX:
            mapping = {f"^{re.escape(prefix[0])}": prefix[1]}
            model, info = load(cls, *args, **options, key_mapping=mapping)
            missing, left = _counted(info), sorted(info["unexpected_keys"])
            report_prefixes(place, [prefix])
        shapes = {name: (found, wanted) for name, found, wanted in info["mismatched_keys"]}
        if fault := misfit(missing, left, shapes):
            raise CheckpointError(
                f"{place}: {fault}; missing weights are not initialised at random, so use a "
                "complete copy of the model"
            )
        report_unused(place, (name for name in left if not is_head(name)))
        check_finite(place, model.state_dict().items())
        return (model, info) if asked else model

    with replaced(PreTrainedModel, "from_pretrained", classmethod(checked)):
        yield


def load_causal(
    folder: Path, dtype: torch.dtype | str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the causal LM of a folder that lbr-ds made. Raises CheckpointError if incomplete.

    dtype: as `from_pretrained` takes it; "auto": as the weights are stored.
    """
    try:
        with no_pickles(str(folder)), complete(str(folder)):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code, **SAFE
            )
            return model
    except LbrError:
        raise
    except Exception as error:  # safetensors, configs and the file system each raise their own
        raise CheckpointError(f"{folder}: cannot be loaded: {why_not(error)}") from None


def _counted(info: dict[str, Any]) -> list[str]:
    return sorted(name for name in info["missing_keys"] if not _UNUSED.search(name))


def is_head(name: str) -> bool:
    """Return whether a tensor belongs to the language-model head, which an encoder does not use."""
    return _HEAD.match(name) is not None


def positions(config: Any) -> int | None:
    """Return how many positions a model supports; None if there is no limit.

    Scaled rotary positions (`rope_parameters`) reach `factor` times as far as the original ones.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    factor = max((float(kind.get("factor") or 1) for kind in kinds), default=1.0)
    original = max(int(kind.get("original_max_position_embeddings") or 0) for kind in kinds)
    return max(limit, int(factor * (original or limit)))


def check_positions(place: str, config: Any, lengths: Mapping[str, int]) -> None:
    """Raise ConfigError when sequences of these lengths, added up, exceed the model's positions.

    Args:
        place: the model, for the message.
        config: its transformers config.
        lengths: recipe key -> tokens.
    """
    limit = positions(config)
    if limit is None or (needed := sum(lengths.values())) <= limit:
        return
    added = " + ".join(f"{key}={value}" for key, value in lengths.items())
    total = f" = {needed}" if len(lengths) > 1 else ""
    raise ConfigError(
        f"{added}{total} tokens, but {place} has {limit} positions (max_position_embeddings in its "
        "config.json); lower the lengths, or take a model that was trained on longer texts"
    )
