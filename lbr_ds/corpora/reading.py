"""What a format yields (rows), what a shape makes of it (records), and the tally of what was left
out and why."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lbr_ds.config import SourceConfig
from lbr_ds.errors import DataError
from lbr_ds.records import Record

EXAMPLES, EXAMPLE_CHARS = 3, 160
MAX_LINE = 1 << 26  # bytes; a longer line is named as bad and not held


class Row(NamedTuple):
    """One row of a raw file: where it stands (`FILE:LINE`), a key for its default id, its columns
    or what is wrong with it."""

    where: str
    key: str
    columns: dict[str, Any] | DataError


class Skipped(NamedTuple):
    """A row that the recipe itself leaves out."""

    rule: str
    example: str


# Where a record stands, and the record, what is wrong with it, or the rule that left it out.
Found = tuple[str, Record | DataError | Skipped]
Format = Callable[[Path, SourceConfig], Iterator[Row]]
Progress = Callable[[str, int, int | None], None]  # stage, done, total or None


def source_name(source: SourceConfig, path: Path) -> str:
    """What records without a `source` get: the recipe's name, else the file's first part."""
    return source.name or path.name.split(".")[0] or path.name


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | DataError]]:
    """The lines of a file, plain or gzipped, numbered from 1.

    A line beyond MAX_LINE comes as a DataError. Raises DataError when the file cannot be read.
    """
    # Told by the content: a cached or renamed file may have lost its suffix.
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) < MAX_LINE:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                yield number, DataError(f"{path}:{number}: longer than {MAX_LINE >> 20} MiB")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); fetch it again") from None


def files_below(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or the files below a folder that end so, sorted.

    Raises DataError for a folder that holds none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(f for f in path.rglob("*") if f.name.endswith(suffixes) and f.is_file())
    if not found:
        raise DataError(f"{path}: holds no file that ends in {' or '.join(suffixes)}")
    return found


class Tally:
    """How often each rule left something out, with the first examples."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, rule: str, example: str, count: int = 1) -> None:
        """Count what `rule` left out; `example` is one of it."""
        self.counts[rule] = self.counts.get(rule, 0) + count
        kept = self.examples.setdefault(rule, [])
        if len(kept) < EXAMPLES:
            kept.append(shorten(example))

    def plain(self) -> dict[str, Any]:
        """{rule: {count, examples}}, rules in alphabetical order."""
        return {
            rule: {"count": self.counts[rule], "examples": self.examples[rule]}
            for rule in sorted(self.counts)
        }

    def restore(self, plain: dict[str, Any]) -> None:
        """Become the tally that `plain()` told."""
        self.counts = {rule: entry["count"] for rule, entry in plain.items()}
        self.examples = {rule: list(entry["examples"]) for rule, entry in plain.items()}


def shorten(text: str) -> str:
    """At most EXAMPLE_CHARS characters of it."""
    return text if len(text) <= EXAMPLE_CHARS else text[: EXAMPLE_CHARS - 3] + "..."
