"""Read Parquet, Arrow and data sets of the Hugging Face hub, streamed. Only door for `datasets`."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row, files_below, lost_rows
from lbr_ds.corpora.formats.lines import kind_of
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, LbrError, short

_BATCH = 64  # rows that are held as Python values at a time


def read_parquet(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or of all files below a folder."""
    return _local(path, "parquet")


def read_arrow(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of an Arrow file, or of all files below a folder."""
    return _local(path, "arrow")


def _local(path: Path, kind: str) -> Iterator[Row]:
    for file in files_below(path, (f".{kind}",)):
        prefix = f"{file.stem}-" if path.is_dir() else ""
        try:
            yield from _rows(file, kind, prefix)
        except DataError as error:
            if not path.is_dir():
                raise
            yield lost_rows(file, prefix, error)


def _rows(file: Path, kind: str, prefix: str) -> Iterator[Row]:
    from datasets import load_dataset

    number = 0
    try:
        rows = load_dataset(
            kind,
            # Otherwise the name is interpreted as a pattern.
            data_files=glob.escape(str(file)),
            split="train",
            streaming=True,
            trust_remote_code=False,
        )
        for number, row in enumerate(_plain(rows, f"{file}"), 1):
            yield Row(f"{file}: row {number}", f"{prefix}{number}", row)
    except LbrError:
        raise
    except Exception as error:  # each library that takes part raises its own kinds
        with file.open("rb") as opened:
            detected = kind_of(opened.read(512))
        reason = _line(error)
        if detected and kind not in detected[1]:
            reason = f"it is {detected[0]}; {detected[1]}"
        raise DataError(f"{file}: not readable as {kind} after row {number} ({reason})") from None


def read_hub(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the rows of `hf:NAME[@REVISION]`; `subset` and `split` (train) select."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    place = source.path.removeprefix("hf:")
    name, _, revision = place.partition("@")
    number = 0
    try:
        rows = load_dataset(
            name,
            source.subset or None,
            split=source.split or "train",
            revision=revision or None,
            streaming=True,
            trust_remote_code=False,
        )
        for number, row in enumerate(_plain(rows, source.path), 1):
            yield Row(f"{source.path}: row {number}", str(number), row)
    except ValueError as error:
        raise ConfigError(f"data.sources.path={source.path}: {_line(error)}") from None
    except DatasetNotFoundError as error:
        raise EnvironmentProblem(f"{source.path}: not found on the hub ({_line(error)})") from None
    except LbrError:
        raise
    except Exception as error:  # each library that takes part raises its own kinds
        raise EnvironmentProblem(
            f"{source.path}: cannot be fetched after row {number} ({_line(error)}); "
            "check the name and the network"
        ) from None


def _plain(rows: Any, place: str) -> Iterator[dict[str, Any] | DataError]:
    """Yield the rows of a streamed data set as dictionaries.

    A row with a value that Python cannot hold (a date after the year 9999, text that is not UTF-8)
    is an error of its own. Whole tables are converted: ten times as fast as row by row.
    """
    number = 0
    for table in rows.with_format("arrow").iter(_BATCH):
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


PARQUET = Format(read_parquet, suffixes=(".parquet",), is_text=False)
ARROW = Format(read_arrow, suffixes=(".arrow",), is_text=False)
HUB = Format(read_hub, is_text=False)
