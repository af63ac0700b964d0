"""What pydantic says of a recipe -> one line that names the key, the value and the cure."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from lbr_ds.errors import short
from lbr_ds.system.urls import public_url


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault in one line, with the nearest known name for an unknown key of `model`."""
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
    told = short(public_url(given)) if isinstance(given, str) else short(given)
    value = (
        ""
        if isinstance(given, dict)
        else f" (got {told!r})"
        if isinstance(given, str)
        else (f" (got {told})")
    )
    reason = short(first["msg"].removeprefix("Value error, "), 400)
    if first["type"] == "string_type" and isinstance(given, (int, float, bool)):
        reason += "; put it in quotes"
    return f"{where + ': ' if where else ''}{reason}{value}{more}"


def _known_keys(path: tuple[int | str, ...], part: type[BaseModel]) -> list[str]:
    """The keys that the part of the recipe at `path` may have."""
    for step in path:
        if isinstance(step, int):
            continue
        fields = {f.alias or name: f for name, f in part.model_fields.items()}
        inner = _section_of(fields[step].annotation)
        if inner is None:
            return []
        part = inner
    return [f.alias or name for name, f in part.model_fields.items()]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Part`, `list[Part]` or `Part | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        found = (_section_of(a) for a in typing.get_args(annotation))
        return next((p for p in found if p), None)
    return None
