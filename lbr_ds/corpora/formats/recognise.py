"""Recognise the shape of a source's rows from the first of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.corpora.formats.interface import Row, listing
from lbr_ds.corpora.formats.peers import PEERS
from lbr_ds.corpora.formats.scores import are_numbers
from lbr_ds.corpora.formats.shapes import SHAPES, if_wrapped, mismatch
from lbr_ds.corpora.formats.values import MissingColumn
from lbr_ds.errors import DataError
from lbr_ds.records import Record

FIRST_ROWS, _TRIED_ROWS = 50, 10_000  # that are looked at: valid ones, and in all
_LONGEST_NAME = 30  # letters of a column; a longer name is a text in a table without a header
_FIELDS = Record.__dataclass_fields__.keys()
_TITLES = {
    "records": "records",
    "pairs": "pairs",
    "passages": "passages",
    **{name: peer.title for name, peer in PEERS.items()},
}
_IMPLIED = {
    "choices": {"options"},
    "pairs": {"query", "positives", "negatives"},
    "titled": {"title", "body"},
    "passages": {"text"},
}


@dataclass(frozen=True)
class Form:
    """What the rows of a source are.

    Attributes:
        shape: A key of SHAPES.
        inside: The key of the list that holds the records in each object of the file, if any.
        header: The columns of a table without a header line.
        told: For the user: what was recognised.
    """

    shape: str
    inside: str = ""
    header: tuple[str, ...] = ()
    told: str = ""

    def unpacked(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows, or those in their lists."""
        if not self.inside:
            yield from rows
            return
        for row in rows:
            held = row.columns.get(self.inside) if isinstance(row.columns, dict) else None
            if not isinstance(held, list):
                lacks = f"needs {self.inside!r}, a list of records, as the first row has"
                fault = DataError(f"{row.where}: {lacks}")
                yield row._replace(columns=fault) if isinstance(row.columns, dict) else row
                continue
            for number, one in enumerate(held, 1):
                where = f"{row.where}: {self.inside} {number}"
                fault = DataError(f"{where}: must be a JSON object, not {type(one).__name__}")
                yield Row(where, f"{row.key}-{number}", one if isinstance(one, dict) else fault)


def shape_of(columns: ColumnsConfig) -> str:
    """Return the shape that the named columns imply, or ""."""
    named = columns.model_dump(exclude_defaults=True).keys()
    return next((shape for shape, parts in _IMPLIED.items() if named & parts), "")


def recognise(
    rows: Iterable[Row], source: SourceConfig, place: str, key: str, is_tsv: bool = False
) -> Form:
    """Return the form of the rows that begin a source.

    A source whose rows are all invalid is read as records; their errors say what is wrong.

    Args:
        rows: The rows.
        source: The source in the recipe.
        place: The file, for messages.
        key: The source's place in the recipe, for messages.
        is_tsv: Whether the rows are a table that may have no header line.

    Raises:
        DataError: No shape fits.
    """
    held = ((row.where, row.columns) for row in islice(rows, _TRIED_ROWS))
    valid = ((where, row) for where, row in held if isinstance(row, dict) and _passes(row, source))
    first = list(islice(valid, FIRST_ROWS))
    if not first:
        return Form("records")
    found = Counter(filter(None, (_form(row, source) for _, row in first)))
    if not found and is_tsv and _is_headless(first[0][1], source):
        found = Counter([("msmarco_triples", "")])
    if not found:
        where, row = first[0]
        raise DataError(
            f"{where}: the columns {listing(row)} have no known shape; name "
            f"the shape in {key}.shape, or the columns of query and positives (or of text) in "
            f"{key}.columns{if_wrapped(row)}"
        )
    (shape, inside), _ = found.most_common(1)[0]
    peer = PEERS.get(shape)
    header = peer.header if peer and not source.header else ()
    names = list(dict.fromkeys(name for _, row in first for name in _inner(row, inside)))
    used = list(header) or (peer.used(names) if peer else [n for n in names if n in _FIELDS])
    unused = [n for n in used if peer and n in peer.tuple_scores and not _numeric(first, inside, n)]
    used = [n for n in used if n not in unused]
    told = [
        f"{place}: read as {_TITLES[shape]} ({listing(used)})",
        f" in each {inside!r}" if inside else "",
        f"; use {key}.shape to name another",
        f"; {listing(unused)} not used" if unused else "",
    ]
    return Form(shape, inside, header, "".join(told))


def unpack(rows: Iterable[Row], source: SourceConfig, shape: str) -> Form:
    """Return the form of rows whose shape the recipe gives: whether lists hold the records."""
    peer = PEERS.get(shape)
    header = peer.header if peer and not source.header else ()
    row = next((row.columns for row in islice(rows, 1) if isinstance(row.columns, dict)), {})
    inside = ""
    if row and _lacks(row, source, shape):
        lists = (name for name, first in _lists(row) if not _lacks(first, source, shape))
        inside = next(lists, "")
    return Form(shape, inside, header)


def _form(row: dict[str, Any], source: SourceConfig) -> tuple[str, str] | None:
    """Return the shape of a row and "", or that of the only list of records in it and its key."""
    if shape := _shape(row, source):
        return shape, ""
    inner = [(shape, name) for name, first in _lists(row) if (shape := _shape(first, source))]
    return inner[0] if len(inner) == 1 else None


def _lists(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the columns that hold a list of objects, each with its first one."""
    lists = [(name, held[0]) for name, held in row.items() if isinstance(held, list) and held]
    return [(name, first) for name, first in lists if isinstance(first, dict)]


def _shape(row: dict[str, Any], source: SourceConfig) -> str:
    """Return the shape of a row, or ""."""
    is_pair = "query" in row and "positives" in row
    named = bool(source.columns.model_dump(exclude_defaults=True))
    if is_pair:
        return "records" if isinstance(row["positives"], list) and not named else "pairs"
    is_passage = "text" in row and not isinstance(row["text"], list | dict)
    if is_passage and row.keys() <= _FIELDS and not named:
        return "records"
    for name, peer in PEERS.items():
        if peer.fits(row):
            return name
    return "passages" if is_passage else ""


def _is_headless(row: dict[str, Any], source: SourceConfig) -> bool:
    """Return whether the names of three columns are texts: a table without a header line."""
    is_text = any(len(name) > _LONGEST_NAME for name in row)
    return is_text and len(row) == 3 and not source.header


def _passes(row: dict[str, Any], source: SourceConfig) -> bool:
    """Return whether `where` keeps a row, as far as it has the columns."""
    try:
        return not mismatch(dict(row), source, "")
    except DataError:
        return True


def _lacks(row: dict[str, Any], source: SourceConfig, shape: str) -> bool:
    """Return whether a row lacks a column of the shape."""
    try:
        SHAPES[shape](row, source, "")
    except MissingColumn:
        return True
    except DataError:
        pass
    return False


def _numeric(rows: list[tuple[str, dict[str, Any]]], inside: str, column: str) -> bool:
    """Return whether a column holds numbers in any row."""
    return any(are_numbers(_inner(row, inside).get(column)) for _, row in rows)


def _inner(row: dict[str, Any], inside: str) -> dict[str, Any]:
    """Return the row, or the first object of its list of records."""
    return dict(_lists(row)).get(inside, {}) if inside else row
