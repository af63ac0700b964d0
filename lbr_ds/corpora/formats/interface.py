"""The interface of a format: a function that yields rows, and defaults for the recipe.

To add a format, write a module like this one and add it to `FORMATS` in `formats/__init__.py`::

    def read_ini(path: Path, source: SourceConfig) -> Iterator[Row]:
        for number, line in numbered_lines(path, source.encoding):
            name, _, value = line.partition("=")
            yield Row(f"{path}:{number}", str(number), {"name": name, "value": value})

    INI = Format(read_ini, suffixes=(".ini",))

What becomes of the columns is decided by the recipe (`shapes.py`). A reader yields a `DataError`
in place of the columns for a row that it cannot use, and raises one only if nothing can be read.
For a damaged file among others it yields `lost_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.errors import DataError


class Skipped(NamedTuple):
    """A row that is valid but gives no record; it is counted under `rule`."""

    rule: str
    example: str


class Row(NamedTuple):
    """One row of a raw file.

    Attributes:
        where: Its place for messages, as `FILE:LINE`.
        key: Unique in the source; the record's id is made from it unless the recipe names a column.
        columns: The values by column, what is wrong with the row, or why it is skipped.
    """

    where: str
    key: str
    columns: dict[str, Any] | DataError | Skipped


@dataclass(frozen=True)
class Format:
    """How to read a format, and what applies where the recipe does not say.

    Attributes:
        read: Yields the rows of a file, or of all files of the format below a folder, in an order
            that depends on nothing but their content and names.
        suffixes: Of file names (before `.gz`) that select the format.
        columns: The columns' meaning.
        shape: The shape of a row, see `shapes.py`; empty: what the recipe's columns imply, else
            recognised from the first rows (`recognise.py`).
        is_text: Whether the recipe's `encoding` applies.
        only_files: Whether a folder is refused.
        keep_lines: Whether line ends and indentation carry meaning.
        files: Yields path and content of the files below a folder that are read; None: all.
    """

    read: Callable[[Path, SourceConfig], Iterator[Row]]
    suffixes: tuple[str, ...] = ()
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    shape: Literal["", "records", "pairs", "passages"] = ""
    is_text: bool = True
    only_files: bool = False
    keep_lines: bool = False
    files: Callable[[Path], Iterator[tuple[str, bytes]]] | None = None


def files_below(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the file itself, or the sorted files below a folder that end in one of `suffixes`.

    Raises:
        DataError: The folder holds no such file.
    """
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.name.endswith(suffixes) and f.is_file())
    if not files:
        raise DataError(f"{path}: holds no file that ends in {' or '.join(suffixes)}")
    return files


def lost_rows(file: Path, prefix: str, error: DataError) -> Row:
    """Return the invalid row that replaces the unreadable rest of a file among others.

    It is counted like any invalid row, and with `on_error=skip` the other files are read.
    """
    fault = DataError(f"{error}; the rest of this file is lost, so restore it")
    return Row(str(file), f"{prefix}rest", fault)


def listing(names: Iterable[str]) -> str:
    """Return names for a message: at most a dozen, each of bounded length."""
    listed = list(names)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return ", ".join(f"{name:.40}" for name in listed[:12]) + more
