"""The interface of a format: a function that yields rows, and defaults for the recipe.

To add a format, write a module like this one and add it to `FORMATS` in `formats/__init__.py`::

    def read_ini(path: Path, source: SourceConfig) -> Iterator[Row]:
        for number, line in numbered_lines(path, source.encoding):
            name, _, value = line.partition("=")
            yield Row(f"{path}:{number}", str(number), {"name": name, "value": value})

    INI = Format(read_ini, suffixes=(".ini",))

The recipe decides how the columns are used (`shapes.py`). For a row that it cannot use, a reader
yields a `DataError` in place of the columns; it raises one only if nothing can be read. For a
damaged file among others it yields `lost_rows`.

A format whose files can be read in pieces has `Parts`: many processes then read one source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.errors import DataError
from lbr_ds.system.remote_files import RANGE_BYTES, RemoteFile, RemoteFiles
from lbr_ds.system.urls import is_url

PIECE_BYTES = RANGE_BYTES  # of a piece; one request, and little enough to be held
RESTORE = "the rest of this file is lost, so restore it"
_File = TypeVar("_File", Path, RemoteFile)


File = Path | RemoteFile
Place = Path | RemoteFiles
"""A file, a folder, or the files that a URL names."""


class Skipped(NamedTuple):
    """A row that is valid but gives no record; it is counted under `rule`."""

    rule: str
    example: str


class Piece(NamedTuple):
    """A part of a source that one process reads; together they are the source, in order.

    Attributes:
        number: Its place in the order of reading.
        file: The path of its file; empty: the whole source.
        begin: Where it begins: a byte of a text file, a row group of a Parquet file.
        end: Where it ends; 0: at the end of the file, which is then read from its start.
        rows: Lines or rows of the file before it, so that its rows are numbered as in the file.
        length: How many bytes of the file it has.
        fault: Why this part of the file cannot be found; it is then one invalid row.
        size: The length of a remote file.
        version: What identifies the content of a remote file.
        few: Whether its first rows may be all that is read, so that little is fetched ahead.
        data: The bytes of the piece, if they had to be fetched to find it.
    """

    number: int = 0
    file: str = ""
    begin: int = 0
    end: int = 0
    rows: int = 0
    length: int = 0
    fault: str = ""
    size: int = 0
    version: str = ""
    few: bool = False
    data: bytes = b""

    @classmethod
    def of(cls, file: File) -> Piece:
        """Return the piece that is a whole file."""
        if isinstance(file, RemoteFile):
            return cls(0, file.url, 0, 0, 0, file.size, "", file.size, file.version)
        return cls(file=str(file), length=size_of(file))

    @property
    def place(self) -> File:
        """Its file."""
        if is_url(self.file):
            return RemoteFile(self.file, self.size, self.version)
        return Path(self.file)

    def is_before(self, other: Piece | None) -> bool:
        """Return whether this piece is of the same file as another, and before it."""
        return other is not None and self.file == other.file and self.begin < other.begin


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
class Parts:
    """How to read a format in pieces.

    Attributes:
        cut: Yields the pieces of a file, or of all files of the format below a folder; the last
            argument is the piece to begin with, None for the first. They depend on nothing but the
            content and the names of the files. Their numbers are set later.
        read: Yields the rows of a piece.
        suffixes: Of names of files, which select those of a folder.
        whole: Whether a piece may also be a whole file, which needs no cutting.
        remote: Whether files behind URLs are read, too.
    """

    cut: Callable[[Place, SourceConfig, Piece | None], Iterator[Piece]]
    read: Callable[[Place, SourceConfig, Piece], Iterator[Row]]
    suffixes: tuple[str, ...]
    whole: bool = True
    remote: bool = True

    def first_rows(self, path: Place, source: SourceConfig) -> Iterator[Row]:
        """Yield the rows as `all` does, and fetch little more than those that are asked for."""
        files = map(Piece.of, files_of(path, self.suffixes)) if self.whole else None
        for piece in files or self.cut(path, source, None):
            yield from self.read(path, source, piece._replace(few=True))

    def all(self, path: Place, source: SourceConfig) -> Iterator[Row]:
        """Yield the rows of all pieces: the function `read` of the format."""
        for piece in self.cut(path, source, None):
            yield from self.read(path, source, piece)


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
        parts: How to read it in pieces; None: one process reads a source.
    """

    read: Callable[[Any, SourceConfig], Iterator[Row]]
    suffixes: tuple[str, ...] = ()
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    shape: Literal["", "records", "pairs", "passages"] = ""
    is_text: bool = True
    only_files: bool = False
    keep_lines: bool = False
    files: Callable[[Path], Iterator[tuple[str, bytes]]] | None = None
    parts: Parts | None = None


def files_below(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the file itself, or the sorted files below a folder that end in one of `suffixes`.

    Raises:
        DataError: The folder holds no such file.
    """
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.name.endswith(suffixes) and f.is_file())
    return _not_empty(files, path, suffixes)


def files_of(path: Place, suffixes: tuple[str, ...], first: Piece | None = None) -> list[File]:
    """Return what `files_below` does, also for a URL, from the file of piece `first` on."""
    if isinstance(path, Path):
        files: list[File] = list(files_below(path, suffixes))
    elif path.many:
        named = [file for file in path.listed if file.name.endswith(suffixes)]
        files = list(_not_empty(named, path, suffixes))
    else:
        files = list(path.listed)
    if first:
        names = [file.url if isinstance(file, RemoteFile) else str(file) for file in files]
        return files[names.index(first.file) :]
    return files


def size_of(file: File) -> int:
    """Return the length of a file in bytes."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def _not_empty(files: list[_File], path: Place, suffixes: tuple[str, ...]) -> list[_File]:
    if not files:
        raise DataError(f"{path}: holds no file that ends in {' or '.join(suffixes)}")
    return files


def lost_rows(file: File, prefix: str, error: DataError) -> Row:
    """Return the invalid row that replaces the unreadable rest of a file among others.

    It is counted like any invalid row, and with `on_error=skip` the other files are read.
    """
    fault = DataError(f"{error}; {RESTORE}")
    return Row(str(file), f"{prefix}rest", fault)


def listing(names: Iterable[str]) -> str:
    """Return names for a message: at most a dozen, each of bounded length."""
    listed = list(names)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return ", ".join(f"{name:.40}" for name in listed[:12]) + more
