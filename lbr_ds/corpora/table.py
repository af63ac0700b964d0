"""CSV and TSV, plain or gzipped: a header line, then one row a record.

CSV has quotes and may hold line ends inside them; a TSV is cut at every tab, quotes are text. A
file without a header takes its columns' names from the recipe's `header`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.reading import MAX_LINE, Row, files_below, numbered_lines
from lbr_ds.errors import DataError


def read_csv(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of a comma-separated file, or of all below a folder."""
    csv.field_size_limit(MAX_LINE)
    for file in files_below(path, (".csv", ".csv.gz")):
        yield from _table(file, path, source, csv.reader(_Lines(file), strict=True))


def read_tsv(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of a tab-separated file, or of all below a folder."""
    for file in files_below(path, (".tsv", ".tsv.gz")):
        yield from _table(file, path, source, _Tabbed(_Lines(file)))


class _Lines:
    """The lines of a file as text; a byte that is no UTF-8 becomes a surrogate, found later."""

    def __init__(self, file: Path) -> None:
        self._lines = numbered_lines(file)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        if isinstance(line, DataError):
            raise line
        text = line.decode("utf-8", "surrogateescape")
        return text.removeprefix("\ufeff") if number == 1 else text


class _Tabbed:
    """What csv.reader is, for lines that are cut at tabs only."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self.line_num = 0

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        line = next(self._lines)
        self.line_num += 1
        line = line.rstrip("\r\n")
        return line.split("\t") if line else []


def _table(file: Path, path: Path, source: SourceConfig, reader: Any) -> Iterator[Row]:
    header = source.header
    prefix = f"{file.name.split('.')[0]}-" if path.is_dir() else ""
    while True:
        number = reader.line_num + 1
        where = f"{file}:{number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(where, "", DataError(f"{where}: not CSV ({error}); check the quotes"))
            continue
        if not cells:
            continue
        if header:
            yield Row(where, f"{prefix}{number}", _named(header, cells, where))
        else:
            header = _header(cells, where)


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: the header names {twice[0]!r} twice")
    return names


def _named(header: list[str], cells: list[str], where: str) -> dict[str, Any] | DataError:
    """The cells by name; a last name with a star takes all that is left, as a list."""
    row: dict[str, Any] = {}
    if header[-1].startswith("*"):
        header, rest = header[:-1], header[-1][1:]
        row[rest] = cells[len(header) :]
        cells = cells[: len(header)]
    if len(cells) != len(header):
        return DataError(f"{where}: has {len(cells)} cells and the header {len(header)}")
    for name, cell in zip(header, cells, strict=True):
        try:
            cell.encode()
        except UnicodeEncodeError:
            return DataError(f"{where}: not UTF-8 in column {name!r}")
        row[name] = cell
    return row
