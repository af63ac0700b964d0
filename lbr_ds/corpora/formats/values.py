"""Get values and texts out of the columns of a row, which may hold lists and objects."""

from __future__ import annotations

import difflib
import math
import re
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.curate.segmentation import visible
from lbr_ds.corpora.formats.interface import listing
from lbr_ds.errors import DataError

_FIELD = re.compile(r"\{([^{}]+)\}")
_TEXT_NAMES = ("text", "content", "contents")
ID_NAMES = ("docid", "doc_id", "_id", "id")


class MissingColumn(DataError):
    """The row lacks a column that the recipe names."""


class IncompleteRecipe(DataError):
    """The source needs a key that the recipe lacks; no row can be trusted without it."""


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


def named_parts(row: dict[str, Any], source: SourceConfig, where: str) -> dict[str, Any]:
    """Return id, group, instructions and scores if the recipe names columns for them.

    An empty cell does not replace the instruction of the source.
    """
    named: dict[str, Any] = {}
    for name in ("positive_scores", "negative_scores"):
        if column := getattr(source.columns, name):
            named[name] = numbers(column_value(row, column, where), column, where)
    for name in ("id", "group", "instruction", "document_instruction"):
        if column := getattr(source.columns, name):
            if "{" in column:
                named[name] = "".join(template_texts(row, column, where))
            else:
                named[name] = cell_text(column_value(row, column, where), column, where)
    return {k: v for k, v in named.items() if v or not k.endswith("instruction")}


def numbers(value: Any, column: str, where: str) -> list[float]:
    """Return the numbers of a column: a number, or a list of numbers; nothing for null.

    Raises:
        DataError: The column holds anything else.
    """
    try:
        found = [float(one) for one in flattened(value) if value is not None]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise DataError(f"{where}: {column} must be numbers, not {value!r:.60}")
    return found


def passage_texts(value: Any, column: str, where: str, by_id: bool = False) -> list[str]:
    """Return the texts of a column of passages, without empty ones.

    A passage is a text, or an object with `text` (or `content`, `contents`) and maybe a `title`:
    `title. text`, as in BEIR. An object of lists is a list of objects.

    Args:
        value: A passage, or nested lists of passages.
        column: Its name, for messages.
        where: The place of the row, for messages.
        by_id: Whether an object that only has an id means the document of that id (`documents`).

    Raises:
        DataError: A passage has no text.
    """
    if isinstance(value, str):
        return [value] if visible(value) else []
    texts = [
        one if isinstance(one, str) else _passage_text(one, column, where, by_id)
        for outer in flattened(value)
        for one in (objects(outer) if isinstance(outer, dict) else [outer])
    ]
    return [text for text in texts if visible(text)]


def objects(value: Any) -> list[Any]:
    """Return a list of objects; an object of equally long lists is how Arrow may store one."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else []
    sizes = {len(one) if isinstance(one, list) else -1 for one in value.values()}
    if len(sizes) != 1 or sizes == {-1}:
        return [value]
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def _passage_text(value: Any, column: str, where: str, by_id: bool) -> str:
    if not isinstance(value, dict):
        return cell_text(value, column, where)
    name = next((name for name in _TEXT_NAMES if name in value), "")
    if not name and (ident := next((name for name in ID_NAMES if name in value), "")):
        if by_id:
            return cell_text(value[ident], f"{column}.{ident}", where)
        raise IncompleteRecipe(
            f"{where}: column {column!r} names documents by {ident} and has no text; name the file "
            "of the documents in data.sources.documents"
        )
    if not name:
        return cell_text(value, column, where)  # raises
    parts = (value.get("title"), value[name])
    return ". ".join(
        text
        for text in (cell_text(part, f"{column}.{name}", where) for part in parts)
        if visible(text)
    )


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
