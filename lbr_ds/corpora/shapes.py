"""Rows -> records, as the recipe's `shape`, `columns` and `where` say.

records   the row is a record already (records.py); `id` and `source` may be missing
pairs     query -> positives, and negatives if there are any
choices   a question with options: query -> the full text of the right one; the others are negatives
titled    title -> body
passages  text alone
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.reading import Format, Found, Row, Skipped, source_name
from lbr_ds.errors import DataError
from lbr_ds.records import Record

_FIELD = re.compile(r"\{([^{}]+)\}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MissingColumn(DataError):
    """A column that the recipe names and the row has not."""


def read_records(rows: Format, path: Path, source: SourceConfig, shape: str) -> Iterator[Found]:
    """Yield where each row stands with its record, what is wrong with it, or why it is left out.

    Raises DataError when the first row lacks a column that the recipe names.
    """
    name = source_name(source, path)
    for count, row in enumerate(rows(path, source)):
        if isinstance(row.columns, DataError):
            yield row.where, row.columns
            continue
        try:
            fields = dict(row.columns)
            reason = _mismatch(fields, source, row.where)
            if reason:
                yield row.where, Skipped("not_where", f"{row.where}: {reason}")
                continue
            raws = SHAPES[shape](fields, source, row.where)
        except MissingColumn as error:
            if not count:
                raise
            yield row.where, error
            continue
        except DataError as error:
            yield row.where, error
            continue
        yield from _records(raws, name, row, source, shape)


def _records(
    raws: list[dict[str, Any]], name: str, row: Row, source: SourceConfig, shape: str
) -> Iterator[Found]:
    for number, raw in enumerate(raws, 1):
        key = row.key if len(raws) == 1 else f"{row.key}-{number}"
        raw = {**_instructions(source), "id": f"{name}-{key}", "source": name, **raw}
        if raw.get("text"):
            raw.pop("instruction", None)  # a plain passage has no query
        try:
            yield row.where, Record.from_dict(raw, row.where)
        except DataError as error:
            yield row.where, error


def _instructions(source: SourceConfig) -> dict[str, str]:
    """The source's own, for records without any."""
    sides = {"instruction": source.instruction.query,
             "document_instruction": source.instruction.document}  # fmt: skip
    return {name: text for name, text in sides.items() if text}


def _mismatch(row: dict[str, Any], source: SourceConfig, where: str) -> str:
    """The first pattern that the row does not pass, or nothing; a list keeps what passes."""
    for column, pattern in source.where.items():
        value = _value(row, column, where)
        if isinstance(value, list):
            row[column] = [v for v in value if re.fullmatch(pattern, str(v), re.DOTALL)]
            passed = bool(row[column])
        else:
            text = "" if value is None else str(value)
            passed = re.fullmatch(pattern, text, re.DOTALL) is not None
        if not passed:
            return f"{column} is {value!r:.80}"
    return ""


def _value(row: dict[str, Any], column: str, where: str) -> Any:
    """What stands in a column; `outer.inner` looks inside."""
    value: Any = row
    if column in row:
        return row[column]
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            near = difflib.get_close_matches(column, row, 1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise MissingColumn(f"{where}: no column {column!r}; {hint}it has {', '.join(row)}")
        value = value[part]
    return value


def _texts(row: dict[str, Any], column: str | list[str], where: str) -> list[str]:
    """The texts of a column, of several, or of a template; empty ones left out."""
    if isinstance(column, list):
        return [text for one in column for text in _texts(row, one, where)]
    if "{" in column:
        parts = {name: _text(row, name, where) for name in _FIELD.findall(column)}
        return [_FIELD.sub(lambda match: parts[match[1]], column)] if all(parts.values()) else []
    value = _value(row, column, where)
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str):
            raise DataError(f"{where}: column {column!r} holds {one!r:.60}, not text")
    return [one for one in values if one.strip()]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = _value(row, column, where)
    return "" if value is None else str(value)


def _named(row: dict[str, Any], source: SourceConfig, where: str) -> dict[str, Any]:
    """id, group and instructions where the recipe names a column for them.

    An empty cell leaves the source's own instruction in place.
    """
    found = {}
    for name in ("id", "group", "instruction", "document_instruction"):
        column = getattr(source.columns, name)
        if column:
            filled = _texts(row, column, where) if "{" in column else [_text(row, column, where)]
            found[name] = "".join(filled)
    return {k: v for k, v in found.items() if v or not k.endswith("instruction")}


def _as_record(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    return [row]


def _as_pairs(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    """One pair; where the query's column holds a list, one for each of it in one group."""
    columns = source.columns
    raw = _named(row, source, where)
    raw["positives"] = _texts(row, columns.positives or "positives", where)
    if columns.negatives or "negatives" in row:
        raw["negatives"] = _texts(row, columns.negatives or "negatives", where)
    queries = _texts(row, columns.query or "query", where)
    return [{**raw, "query": query} for query in queries or [""]]


def _as_titled(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    columns = source.columns
    title = _texts(row, columns.title or "title", where)
    body = _texts(row, columns.body or "body", where)
    return [{**_named(row, source, where), "query": " ".join(title), "positives": body}]


def _as_passage(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    text = _texts(row, source.columns.text or "text", where)
    if not text:
        raise DataError(f"{where}: {source.columns.text or 'text'} is empty")
    return [{**_named(row, source, where), "text": "\n".join(text)}]


def _as_choices(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    columns = source.columns
    options = _options(row, columns.options or "options", where)
    answer = _value(row, columns.answer or "answer", where)
    raw = _named(row, source, where)
    raw["query"] = " ".join(_texts(row, columns.query or "query", where))
    right = _right(options, answer, source.answer_as, where)
    raw["positives"] = [right]
    # An option that says the same is not wrong; what is alike but for punctuation goes later.
    raw["negatives"] = [
        text for text in options.values() if _folded(text) not in ([], _folded(right))
    ]
    return [raw]


def _folded(text: str) -> list[str]:
    return text.casefold().split()


def _options(row: dict[str, Any], column: str | list[str], where: str) -> dict[str, str]:
    """Label -> option. Labels are A, B, ... unless a mapping brings its own."""
    if isinstance(column, list):
        listed: Any = [_text(row, one, where) for one in column]
    else:
        listed = _value(row, column, where)
        if isinstance(listed, str):
            try:
                listed = json.loads(listed)
            except ValueError:
                raise DataError(f"{where}: column {column!r} is neither list nor mapping") from None
    if isinstance(listed, dict) and isinstance(listed.get("text"), list):  # {label: [], text: []}
        listed = dict(zip(listed.get("label", _LETTERS), listed["text"], strict=False))
    if isinstance(listed, list):
        listed = dict(zip(_LETTERS, listed, strict=False))
    if not isinstance(listed, dict) or not listed:
        raise DataError(f"{where}: column {column!r} is neither list nor mapping")
    return {str(label): "" if text is None else str(text) for label, text in listed.items()}


def _right(options: dict[str, str], answer: Any, answer_as: str, where: str) -> str:
    """The full text of the right option."""
    told = str(answer).strip()
    if answer_as == "text":
        found = [text for text in options.values() if text.strip().casefold() == told.casefold()]
    elif answer_as == "letter":
        letter = told.strip("().: ").casefold()
        found = [text for label, text in options.items() if label.casefold() == letter]
    else:
        place = int(told) - int(answer_as[-1]) if re.fullmatch(r"-?\d+", told) else -1
        found = list(options.values())[place : place + 1] if place >= 0 else []
    if not found or not found[0].strip():
        known = ", ".join(options)
        raise DataError(
            f"{where}: answer {told!r} read as {answer_as} is none of the options {known}; "
            "check data.sources.answer_as"
        )
    return found[0]


SHAPES: dict[str, Callable[[dict[str, Any], SourceConfig, str], list[dict[str, Any]]]] = {
    "records": _as_record,
    "pairs": _as_pairs,
    "choices": _as_choices,
    "titled": _as_titled,
    "passages": _as_passage,
}
