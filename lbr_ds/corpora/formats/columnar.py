"""Stream Parquet, Arrow and datasets of the Hugging Face hub. Only this module imports `datasets`.

A piece of a Parquet file is a run of row groups.
"""

from __future__ import annotations

import glob
import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats import interface
from lbr_ds.corpora.formats.interface import (
    File,
    Format,
    Parts,
    Piece,
    Place,
    Row,
    files_of,
    lost_rows,
)
from lbr_ds.corpora.formats.kinds import kind_of
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, LbrError, short
from lbr_ds.system.remote_files import FIRST_BYTES, RemoteFile, RemoteFiles, list_files
from lbr_ds.system.threads import READERS, map_ahead
from lbr_ds.system.urls import is_url

_BATCH = 64  # rows that are held as Python values at a time


def _cut_parquet(path: Place, source: SourceConfig, first: Piece | None) -> Iterator[Piece]:
    """Yield runs of row groups of a Parquet file, or of all files below a folder."""
    files = files_of(path, (".parquet",), first)
    for file, groups in zip(files, _ahead(_row_groups, files), strict=True):
        piece = Piece.of(file)
        if isinstance(groups, DataError):
            if not path.is_dir():
                raise groups
            yield piece._replace(fault=str(groups))
            continue
        size = length = rows = 0
        for number, group in enumerate(groups):
            if size and size + group.size > interface.PIECE_BYTES:
                piece = piece._replace(end=number, length=length)
                if not piece.is_before(first):
                    yield piece
                piece, size, length = piece._replace(begin=number, rows=rows), 0, 0
            size, length, rows = size + group.size, length + group.length, rows + group.rows
        if rows:
            yield piece._replace(end=len(groups), length=length)


def _ahead(work: Callable[[File], Any], files: list[File]) -> Iterator[Any]:
    """Yield `work` of each file; by several threads if they wait for a server."""
    remote = bool(files) and isinstance(files[0], RemoteFile)
    return map_ahead(work, files) if remote else map(work, files)


class _Group(NamedTuple):
    """A row group: its bytes when they are decoded, its bytes in the file, and its rows."""

    size: int
    length: int
    rows: int


def _row_groups(file: File) -> list[_Group] | DataError:
    """Return the row groups of a Parquet file, or what is wrong with it."""
    try:
        with _readable(file, "parquet"):
            footer = _footer(file)
            groups = (footer.row_group(number) for number in range(footer.num_row_groups))
            return [
                _Group(
                    group.total_byte_size,
                    sum(group.column(n).total_compressed_size for n in range(group.num_columns)),
                    group.num_rows,
                )
                for group in groups
            ]
    except DataError as error:
        return error


def _footer(file: File) -> Any:
    if isinstance(file, RemoteFile):
        return _remote_footer(file)
    import pyarrow.parquet

    with file.open("rb") as opened:
        return pyarrow.parquet.read_metadata(opened)


@lru_cache(maxsize=2 * READERS)
def _remote_footer(file: RemoteFile) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(file.ranges())


def _read_parquet(path: Place, source: SourceConfig, piece: Piece) -> Iterator[Row]:
    return _local(path, piece, "parquet", _parquet_tables)


def _parquet_tables(piece: Piece) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    place, groups = piece.place, range(piece.begin, piece.end)
    ahead = isinstance(place, RemoteFile) and not piece.few  # else column by column, in pages
    with place.ranges() if isinstance(place, RemoteFile) else place.open("rb") as file:
        reader = pyarrow.parquet.ParquetFile(
            file, metadata=_footer(place), pre_buffer=ahead, buffer_size=piece.few * FIRST_BYTES
        )
        for batch in reader.iter_batches(_BATCH, groups):
            yield pyarrow.Table.from_batches([batch])


def _cut_arrow(path: Place, source: SourceConfig, first: Piece | None) -> Iterator[Piece]:
    """Yield an Arrow file, or all files below a folder."""
    yield from map(Piece.of, files_of(path, (".arrow",), first))


def _read_arrow(path: Place, source: SourceConfig, piece: Piece) -> Iterator[Row]:
    return _local(path, piece, "arrow", _arrow_tables)


def _arrow_tables(piece: Piece) -> Iterator[Any]:
    from datasets import load_dataset

    rows = load_dataset(
        "arrow",
        data_files=glob.escape(piece.file),  # otherwise the name is interpreted as a pattern
        split="train",
        streaming=True,
        trust_remote_code=False,
    )
    yield from rows.with_format("arrow").iter(_BATCH)


def _local(
    path: Place, piece: Piece, kind: str, tables: Callable[[Piece], Iterator[Any]]
) -> Iterator[Row]:
    """Yield the rows of a piece; of a damaged file in a folder, the rest as one invalid row."""
    file, number = piece.place, piece.rows  # rows read
    prefix = f"{file.stem}-" if path.is_dir() else ""
    try:
        if piece.fault:
            raise DataError(piece.fault)
        with _readable(file, kind, lambda: number):
            for row in _plain(tables(piece), f"{file}", number):
                number += 1
                yield Row(f"{file}: row {number}", f"{prefix}{number}", row)
    except DataError as error:
        if not path.is_dir():
            raise
        yield lost_rows(file, prefix, error)


@contextmanager
def _readable(file: File, kind: str, rows: Callable[[], int] = int) -> Iterator[None]:
    """Raise DataError, with the number of rows read, for an error of a library that reads."""
    try:
        yield
    except LbrError:
        raise
    except Exception as error:  # each library that takes part raises its own kinds
        detected = kind_of(_start(file))
        reason = _line(error)
        if detected and kind not in detected[1]:
            reason = f"it is {detected[0]}; {detected[1]}"
        raise DataError(f"{file}: not readable as {kind} after row {rows()} ({reason})") from None


def _start(file: File) -> bytes:
    """Return the first bytes of a file."""
    if isinstance(file, RemoteFile):
        return file.fetch(0, min(512, file.size))
    with file.open("rb") as opened:
        return opened.read(512)


def is_hub(source: SourceConfig) -> bool:
    """Return whether a source is `hf:NAME[@REVISION]`, a data set of the hub."""
    return source.path.startswith("hf:") and not is_url(source.path)


def hub_files(source: SourceConfig) -> RemoteFiles | None:
    """Return the Parquet files of a split of `hf:NAME[@REVISION]`, at its present commit.

    `datasets` finds them, by the card of the data set and by its rules for file names. None: it has
    another format or no such split, or its card selects columns or rows; `read_hub` reads it.

    Raises:
        ConfigError: There is no such subset.
        EnvironmentProblem: The hub cannot be reached, or has no such data set.
    """
    from datasets import load_dataset_builder

    with _readable_hub(source):
        name, revision = _name(source)
        builder = load_dataset_builder(name, source.subset or None, revision=revision)
        config: Any = builder.config
        urls = {str(url) for url in (config.data_files or {}).get(source.split or "train", ())}
    plain = all(url.startswith("hf://") and url.endswith(".parquet") for url in urls)
    if not urls or not plain or config.columns or config.filters is not None:
        return None
    folders = [posixpath.dirname(url.removeprefix("hf://")) for url in urls]
    folder = f"hf://{posixpath.commonpath(folders)}/"
    listed = tuple(file for file in list_files(folder).listed if file.url in urls)
    if len(listed) != len(urls):
        return None
    return RemoteFiles(folder, Path(source.path).name, len(urls) > 1, listed)


def read_hub(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of `hf:NAME[@REVISION]`; `subset` and `split` (train) select."""
    from datasets import load_dataset

    number = 0
    with _readable_hub(source, lambda: f" after row {number}"):
        name, revision = _name(source)
        rows = load_dataset(
            name,
            source.subset or None,
            split=source.split or "train",
            revision=revision,
            streaming=True,
            trust_remote_code=False,
        )
        tables = rows.with_format("arrow").iter(_BATCH)
        for number, row in enumerate(_plain(tables, source.path), 1):
            yield Row(f"{source.path}: row {number}", str(number), row)


def _name(source: SourceConfig) -> tuple[str, str | None]:
    name, _, revision = source.path.removeprefix("hf:").partition("@")
    return name, revision or None


@contextmanager
def _readable_hub(source: SourceConfig, done: Callable[[], str] = str) -> Iterator[None]:
    """Raise an LbrError for an error of `datasets`; done: how much was read before it."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except ValueError as error:
        raise ConfigError(f"data.sources.path={source.path}: {_line(error)}") from None
    except DatasetNotFoundError as error:
        raise EnvironmentProblem(f"{source.path}: not found on the hub ({_line(error)})") from None
    except LbrError:
        raise
    except Exception as error:  # each library that takes part raises its own kinds
        raise EnvironmentProblem(
            f"{source.path}: cannot be fetched{done()} ({_line(error)}); "
            "check the name and the network"
        ) from None


def _plain(
    tables: Iterable[Any], place: str, number: int = 0
) -> Iterator[dict[str, Any] | DataError]:
    """Yield the rows of tables as dictionaries; number: rows before them.

    A row with a value that Python cannot hold (a date after the year 9999, text that is not UTF-8)
    is an error of its own. Whole tables are converted: ten times as fast as row by row.
    """
    for table in tables:
        try:
            values = table.to_pylist()
        except Exception:  # each type of column raises its own kinds
            values = [
                _one(table.slice(k, 1), f"{place}: row {number + k + 1}") for k in range(len(table))
            ]
        yield from values
        number += len(table)


def _one(table: Any, where: str) -> dict[str, Any] | DataError:
    """Return the only row of a table, or its error."""
    row = {}
    for name in table.column_names:
        try:
            (row[name],) = table[name].to_pylist()
        except Exception as error:
            return DataError(f"{where}: column {name!r} holds no usable value ({_line(error)})")
    return row


def _line(error: Any) -> str:
    return short(error)


_PARQUET = Parts(_cut_parquet, _read_parquet, (".parquet",), whole=False)
_ARROW = Parts(_cut_arrow, _read_arrow, (".arrow",), remote=False)
PARQUET = Format(_PARQUET.all, suffixes=(".parquet",), is_text=False, parts=_PARQUET)
ARROW = Format(_ARROW.all, suffixes=(".arrow",), is_text=False, parts=_ARROW)
HUB = Format(read_hub, is_text=False)
