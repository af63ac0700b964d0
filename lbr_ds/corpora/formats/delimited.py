"""Read CSV and TSV, plain or gzipped: a header line, then a row per line.

CSV has quotes, which may contain line ends; a TSV is split at every tab, and quotes are text. The
recipe's `header` names the columns of a file without a header.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row, files_below
from lbr_ds.corpora.formats.lines import MAX_LINE, BadLine, numbered_lines
from lbr_ds.errors import DataError


def read_csv(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of a comma-separated file, or of all files below a folder."""
    csv.field_size_limit(MAX_LINE)
    for file in files_below(path, (".csv", ".csv.gz")):
        yield from _table(file, path, source, _quoted)


def read_tsv(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of a tab-separated file, or of all files below a folder."""
    for file in files_below(path, (".tsv", ".tsv.gz")):
        yield from _table(file, path, source, _Tabbed)


class _Lines:
    """The lines of a file; of an invalid one, what can be read.

    So a row that begins or ends in it stays complete. `fault` is the error.
    """

    def __init__(self, file: Path, encoding: str) -> None:
        self._lines = numbered_lines(file, encoding)
        self.fault: BadLine | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        if isinstance(line, BadLine):
            self.fault = self.fault or line
            return line.text
        return line

    def take_fault(self) -> BadLine | None:
        """Return the error of the lines since the last call, if any."""
        fault, self.fault = self.fault, None
        return fault


def _quoted(lines: _Lines) -> Any:
    return csv.reader(lines, strict=True)


class _Tabbed:
    """The interface of csv.reader, for lines that are split at tabs only."""

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


def _table(
    file: Path, path: Path, source: SourceConfig, cut: Callable[[_Lines], Any]
) -> Iterator[Row]:
    """Yield the rows of one file; `cut` splits its lines into cells."""
    lines = _Lines(file, source.encoding)
    reader, header = cut(lines), source.header
    prefix = f"{file.name.split('.')[0]}-" if path.is_dir() else ""
    while True:
        number = reader.line_num + 1
        where = f"{file}:{number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            rows = f"{where}-{reader.line_num}" if reader.line_num > number else where
            message = f"{rows}: not CSV ({error}); check the quotes and data.sources.format"
            yield Row(where, "", lines.take_fault() or DataError(message))
            continue
        fault = lines.take_fault() if lines.fault else None
        if fault and not header:
            raise DataError(str(fault))
        if fault:
            yield Row(where, f"{prefix}{number}", fault)
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
        raise DataError(f"{where}: the header names {twice[0]!r:.60} twice; rename one")
    return names


def _named(header: list[str], cells: list[str], where: str) -> dict[str, Any] | DataError:
    """Return the cells by name; a last name with a star takes the rest, as a list."""
    row: dict[str, Any] = {}
    if header[-1].startswith("*"):
        header, rest = header[:-1], header[-1][1:]
        row[rest] = cells[len(header) :]
        cells = cells[: len(header)]
    if len(cells) != len(header):
        return DataError(
            f"{where}: the row has {len(cells)} cells, but the header has {len(header)}; check the "
            "quotes and the delimiter"
        )
    row.update(zip(header, cells, strict=True))
    return row


CSV = Format(read_csv, suffixes=(".csv",))
TSV = Format(read_tsv, suffixes=(".tsv",))
