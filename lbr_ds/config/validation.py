"""Turn a pydantic validation error into one line that names the key, the value and the cure."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lbr_ds.errors import short
from lbr_ds.system.urls import public_url


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first error in one line, with the nearest known name for an unknown key.

    Args:
        error: what `model.model_validate` raised.
        model: the model of the whole file, for the names of its keys.
    """
    first = error.errors()[0]
    where = short(".".join(str(part) for part in first["loc"]), 120)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1], model)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where}; {hint}{more}"
    if first["type"] == "missing":
        return f"missing key {where}; add it{more}"
    given = first["input"]
    if isinstance(given, dict):
        value = ""
    elif isinstance(given, str):
        value = f" (got {short(public_url(given))!r})"
    else:
        value = f" (got {short(given)})"
    reason = short(first["msg"].removeprefix("Value error, "), 400)
    if first["type"] == "string_type" and isinstance(given, (int, float, bool)):
        reason += "; put it in quotes"
    return f"{where + ': ' if where else ''}{reason}{value}{more}"


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model under the names that they have in a file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model M inside the annotation `M`, `list[M]` or `M | None`; else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        models = (inner_model(a) for a in typing.get_args(annotation))
        return next((model for model in models if model), None)
    return None


def _known_keys(path: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Return the keys that the section at `path` may have."""
    for step in path:
        if isinstance(step, int):
            continue
        inner = inner_model(fields_by_key(model)[step].annotation)
        if inner is None:
            return []
        model = inner
    return list(fields_by_key(model))
