"""The sources of a recipe -> cleaned records with unique ids, and what was left out of each.

The whole corpus is held in memory (about twice its text).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lbr_ds.config import DataConfig, SourceConfig
from lbr_ds.corpora import READERS
from lbr_ds.corpora.cleaning import Cleaner
from lbr_ds.corpora.reading import Found, Progress, Reader
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record

_EVERY = 1000  # records between two calls of progress


@dataclass(frozen=True)
class Collected:
    """The records of all sources; `read` and `kept` count them a source, bad ones included."""

    records: list[Record]
    read: list[int]
    kept: list[int]


def reader_of(source: SourceConfig) -> Reader:
    """The reader that the recipe names. Raises ConfigError for a name that is none."""
    if source.reader not in READERS:
        near = difflib.get_close_matches(source.reader, READERS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(READERS)}"
        raise ConfigError(f"data.sources.reader: unknown reader {source.reader!r}; {hint}")
    return READERS[source.reader]


def collect(
    data: DataConfig, files: list[Path], cleaner: Cleaner, progress: Progress | None
) -> Collected:
    """Read and clean every source; `files` are the local files of `data.sources`.

    Raises DataError for a bad record or a repeated id (strict), and for a source without records.
    """
    collected = Collected([], [], [])
    places: dict[str, str] = {}
    for source, path in zip(data.sources, files, strict=True):
        before, read = len(collected.records), 0
        found = islice(reader_of(source)(path, source), source.max_records)
        for read, record in enumerate(_good(found, data, cleaner, places), 1):
            cleaned = cleaner.clean(record) if record else None
            if cleaned:
                collected.records.append(cleaned)
            if progress and read % _EVERY == 0:
                progress(f"read {path.name}", read, None)
        if not read:
            raise DataError(f"{path}: holds no records; check data.sources.path and its reader")
        collected.read.append(read)
        collected.kept.append(len(collected.records) - before)
    if not collected.records:
        reasons = ", ".join(f"{n} {rule}" for rule, n in sorted(cleaner.records.counts.items()))
        raise DataError(f"data.sources: no record is left of {sum(collected.read)} ({reasons})")
    return collected


def _good(
    found: Iterator[Found], data: DataConfig, cleaner: Cleaner, places: dict[str, str]
) -> Iterator[Record | None]:
    """The readable records with new ids; None in place of a bad one that is skipped."""
    for where, record in found:
        rule = "bad_record"
        if isinstance(record, Record):
            first = places.setdefault(record.id, where)
            if first is where:
                yield record
                continue
            rule = "duplicate_id"
            record = DataError(f"{where}: id {record.id!r} is taken already, at {first}")
        if data.on_error == "strict":
            raise DataError(f"{record}; mend it, or set data.on_error=skip to drop and count it")
        cleaner.records.add(rule, str(record))
        yield None
