"""Get values and texts out of the columns of a row, which may hold lists and objects."""

from __future__ import annotations

import difflib
import re
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

from lbr_ds.corpora.curate.segmentation import visible
from lbr_ds.corpora.formats.interface import listing
from lbr_ds.errors import DataError

_FIELD = re.compile(r"\{([^{}]+)\}")


class MissingColumn(DataError):
    """The row lacks a column that the recipe names."""


def column_value(row: dict[str, Any], column: str, where: str) -> Any:
    """Return the value of a column.

    `outer.inner` and `list.0` select inside; `list.inner` selects in each object of a list and
    gives a list of that length, with None for objects without it.
    """
    if column in row:
        return row[column]
    try:
        return _inside(row, column.split("."))
    except KeyError:
        near = difflib.get_close_matches(column, row, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r:.60}? " if near else ""
        raise MissingColumn(f"{where}: no column {column!r}; {hint}it has {listing(row)}") from None


def _inside(value: Any, parts: list[str]) -> Any:
    """Return the value at a path; None below null or beyond the end of a list.

    Raises:
        KeyError: No object has it.
    """
    if not parts or value is None:
        return value
    if isinstance(value, dict):
        return _inside(value[parts[0]], parts[1:])
    if not isinstance(value, list):
        raise KeyError(parts[0])
    if re.fullmatch(r"-?\d+", parts[0]):
        place = int(parts[0])
        return _inside(value[place], parts[1:]) if -len(value) <= place < len(value) else None
    values, lacking = [], 0
    for one in value:
        try:
            values.append(_inside(one, parts))
        except KeyError:
            values.append(None)
            lacking += 1
    if value and lacking == len(value):
        raise KeyError(parts[0])
    return values


def column_texts(row: dict[str, Any], column: str | list[str], where: str) -> list[str]:
    """Return the texts of a column, of several, or of a template, without empty ones."""
    if isinstance(column, list):
        return [text for one in column for text in column_texts(row, one, where)]
    if "{" in column:
        return template_texts(row, column, where)
    values = flattened(column_value(row, column, where))
    return [text for one in values if visible(text := cell_text(one, column, where))]


def template_texts(row: dict[str, Any], template: str, where: str) -> list[str]:
    """Return the text of a template; if its columns hold lists, one for each position."""
    values = {name: column_value(row, name, where) for name in _FIELD.findall(template)}
    lists = {name: flattened(value) for name, value in values.items() if isinstance(value, list)}
    sizes = {name: len(value) for name, value in lists.items()}
    if len({*sizes.values()}) > 1:
        raise DataError(f"{where}: the lists of {template!r:.80} differ in length: {sizes}")
    texts = []
    for place in range(next(iter(sizes.values()), 1)):
        parts = {
            name: cell_text(lists[name][place] if name in lists else value, name, where)
            for name, value in values.items()
        }
        if all(map(visible, parts.values())):
            texts.append(_FIELD.sub(lambda match, parts=parts: parts[match[1]], template))  # type: ignore[misc]
    return texts


def flattened(value: Any) -> list[Any]:
    """Return the values of nested lists in order; any other value in a list."""
    if not isinstance(value, list):
        return [value]
    return [inner for one in value for inner in flattened(one)]


def cell_text(value: Any, column: str, where: str) -> str:
    """Return the text of a cell. Raises DataError for a value without a text."""
    text = as_text(value)
    if text is None:
        inner = [str(name) for name in value] if isinstance(value, dict) else []
        hint = f"; name a part of it, as {column}.{inner[0]:.40}" if inner else ""
        raise DataError(f"{where}: column {column!r:.80} holds {value!r:.60}, not text{hint}")
    return text


def as_text(value: Any) -> str | None:
    """Return the text of a value, for ids, groups and texts; None for a list or an object.

    Numbers are written as in JSON but 7.0 as 7, booleans as true and false, dates as in ISO 8601;
    null and NaN are the empty text.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value) if isinstance(value, int | float | Decimal | date | UUID) else None
