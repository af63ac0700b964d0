"""Make records of rows by the recipe's `shape`, `columns` and `where`.

records   the row has the fields of a record (records.py); `id` and `source` may be missing
pairs     query -> positives, and negatives if there are any
choices   a question with options: query -> text of the right one; the others are negatives
titled    title -> body
passages  text without a query
...       the rows of other trainers' files (peers.py)
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Place, Row, Skipped, listing
from lbr_ds.corpora.formats.peer import Made
from lbr_ds.corpora.formats.peers import PEERS
from lbr_ds.corpora.formats.scores import SIDES
from lbr_ds.corpora.formats.values import (
    IncompleteRecipe,
    MissingColumn,
    as_text,
    cell_text,
    column_texts,
    column_value,
    flattened,
    named_parts,
    passage_texts,
)
from lbr_ds.errors import DataError
from lbr_ds.records import Record

Make = Callable[[dict[str, Any], SourceConfig, str], Made]
Lookup = Callable[[dict[str, Any], str], dict[str, Any]]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


Outcome = tuple[str, Record | DataError | Skipped]
"""The place of a record, and the record, what is wrong with it, or why it is skipped."""


def read_records(
    rows: Iterator[Row],
    name: str,
    source: SourceConfig,
    shape: str,
    lookup: Lookup | None = None,
    before: int = 0,
) -> Iterator[Outcome]:
    """Yield the place and the record, error or reason to skip of each row.

    Args:
        rows: The rows of a file.
        name: The `source` of records without their own.
        source: The source in the recipe.
        shape: A key of SHAPES.
        lookup: Replaces the ids of documents by their texts.
        before: 0 if the first of the rows is the source's first.

    Raises:
        DataError: The first row lacks a column that the recipe names, or the recipe lacks a key.
    """
    make = SHAPES[shape]
    for count, row in enumerate(rows, before):
        if not isinstance(row.columns, dict):
            yield row.where, row.columns
            continue
        try:
            raws = _made(row.columns, source, make, row.where)
            if lookup and not isinstance(raws, Skipped):
                raws = [lookup(raw, row.where) for raw in raws]
        except DataError as error:
            if isinstance(error, IncompleteRecipe):
                raise
            if isinstance(error, MissingColumn) and not count:
                raise MissingColumn(f"{error}{if_wrapped(row.columns)}") from None
            yield row.where, error
            continue
        if isinstance(raws, Skipped):
            yield row.where, raws
            continue
        for where, outcome in _records(raws, name, row, source):
            if not count and isinstance(outcome, DataError):
                outcome = DataError(f"{outcome}{if_wrapped(row.columns)}")
            yield where, outcome


def _made(columns: dict[str, Any], source: SourceConfig, make: Make, where: str) -> Made:
    """Return the fields of a row's records, or why there are none."""
    fields = dict(columns)
    if reason := mismatch(fields, source, where):
        return Skipped("not_where", f"{where}: {reason}")
    return make(fields, source, where)


def if_wrapped(row: dict[str, Any], path: str = "") -> str:
    """Return the cure for a row that is a whole file: an object around the array of records."""
    inner, count = "", 0
    if len(row) > 1 and all(isinstance(value, dict) and value for value in row.values()):
        inner, count = f"{path or '.'}[]", len(row)
    for name, value in row.items() if not inner else ():
        plain = name.isidentifier() and name.isascii()
        here = f"{path}.{name if plain else json.dumps(name)}"
        if isinstance(value, dict) and not path and (hint := if_wrapped(value, here)):
            return hint
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            inner, count = f"{here}[]", len(value)
            break
    if not inner:
        return ""
    return (
        f"; if the {count} object(s) in it are the records, write them to a file of their own, one "
        f"a line: jq -c {shlex.quote(inner)} FILE > NEW.jsonl"
    )


def source_name(source: SourceConfig, path: Place) -> str:
    """Return the recipe's name for a source, or else the first part of the file's name."""
    return source.name or path.name.split(".")[0] or path.name


def _records(
    raws: list[dict[str, Any]], name: str, row: Row, source: SourceConfig
) -> Iterator[Outcome]:
    for number, raw in enumerate(raws, 1):
        key = row.key if len(raws) == 1 else f"{row.key}-{number}"
        raw = {**_instructions(source), "id": f"{name}-{key}", "source": name, **raw}
        if raw.get("text"):
            raw.pop("instruction", None)  # a plain passage has no query
        try:
            yield row.where, Record.from_valid(raw) or Record.from_dict(raw, row.where)
        except DataError as error:
            yield row.where, error


def _instructions(source: SourceConfig) -> dict[str, str]:
    """Return the source's instructions, for records without their own."""
    sides = {
        "instruction": source.instruction.query,
        "document_instruction": source.instruction.document,
    }
    return {name: text for name, text in sides.items() if text}


def mismatch(row: dict[str, Any], source: SourceConfig, where: str) -> str:
    """Return the first pattern that does not match, or ""; a list keeps the values that match."""
    for column, pattern in source.where.items():
        value = column_value(row, column, where)
        if isinstance(value, list):
            row[column] = [v for v in flattened(value) if _passes(v, pattern)]
            passed = bool(row[column])
        else:
            passed = _passes(value, pattern)
        if not passed:
            return f"{column} is {value!r:.80}"
    return ""


def _passes(value: Any, pattern: str) -> bool:
    text = as_text(value)
    return re.fullmatch(pattern, str(value) if text is None else text, re.DOTALL) is not None


def _as_record(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    """Return the row with ids as texts and without nulls; other values stay, as errors."""
    return [
        {
            name: value if name in SIDES.values() else _as_field(value)
            for name, value in row.items()
            if value is not None
        }
    ]


def _as_field(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_field(one) for one in value if one is not None]
    text = as_text(value)
    return value if text is None else text


def _as_pairs(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    """Return one pair; if the query's column holds a list, one pair for each, in one group."""
    columns = source.columns
    raw = named_parts(row, source, where)
    raw["positives"] = column_texts(row, columns.positives or "positives", where)
    if columns.negatives or "negatives" in row:
        raw["negatives"] = column_texts(row, columns.negatives or "negatives", where)
    queries = column_texts(row, columns.query or "query", where)
    return [{**raw, "query": query} for query in queries or [""]]


def _as_titled(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    columns = source.columns
    title = column_texts(row, columns.title or "title", where)
    body = column_texts(row, columns.body or "body", where)
    return [{**named_parts(row, source, where), "query": " ".join(title), "positives": body}]


def _as_passage(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    """Return the passage; unless its column is named, with its title as `passage_texts` has it."""
    titled = not source.columns.text and isinstance(row.get("text"), str)
    text = (
        passage_texts(row, "text", where)
        if titled
        else column_texts(row, source.columns.text or "text", where)
    )
    if not text:
        raise DataError(f"{where}: {source.columns.text or 'text'} is empty")
    return [{**named_parts(row, source, where), "text": "\n".join(text)}]


def _as_choices(row: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
    columns = source.columns
    options = _options(row, columns.options or "options", where)
    answer = column_value(row, columns.answer or "answer", where)
    raw = named_parts(row, source, where)
    raw["query"] = " ".join(column_texts(row, columns.query or "query", where))
    right = _right(options, answer, source.answer_as, where)
    raw["positives"] = [right]
    # An equal option is not wrong; those that differ in punctuation only are removed later.
    raw["negatives"] = [
        text for text in options.values() if _folded(text) not in ([], _folded(right))
    ]
    return [raw]


def _folded(text: str) -> list[str]:
    return text.casefold().split()


def _options(row: dict[str, Any], column: str | list[str], where: str) -> dict[str, str]:
    """Return the options by label; the labels of a list are A, B, ..."""
    if isinstance(column, list):
        listed: Any = [cell_text(column_value(row, one, where), one, where) for one in column]
    else:
        listed = column_value(row, column, where)
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
    return {str(label): cell_text(text, str(column), where) for label, text in listed.items()}


def _right(options: dict[str, str], answer: Any, answer_as: str, where: str) -> str:
    """Return the full text of the right option."""
    given = str(answer).strip()
    if answer_as == "text":
        matches = [text for text in options.values() if text.strip().casefold() == given.casefold()]
    elif answer_as == "letter":
        letter = given.strip("().: ").casefold()
        matches = [text for label, text in options.items() if label.casefold() == letter]
    else:
        place = int(given) - int(answer_as[-1]) if re.fullmatch(r"-?\d+", given) else -1
        matches = list(options.values())[place : place + 1] if place >= 0 else []
    if not matches or not matches[0].strip():
        known = listing(options)
        raise DataError(
            f"{where}: answer {given!r:.60} read as {answer_as} is none of the options {known}; "
            "check data.sources.answer_as"
        )
    return matches[0]


SHAPES: dict[str, Make] = {
    "records": _as_record,
    "pairs": _as_pairs,
    "choices": _as_choices,
    "titled": _as_titled,
    "passages": _as_passage,
    **{name: peer.read for name, peer in PEERS.items()},
}
