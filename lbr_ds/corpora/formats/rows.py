"""What a format yields (rows), what a shape makes of it (records), and the tally of what was left
out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lbr_ds.config import SourceConfig
from lbr_ds.errors import DataError
from lbr_ds.records import Record

EXAMPLES, EXAMPLE_CHARS = 3, 160


class Skipped(NamedTuple):
    """A row that is no fault and no record: counted under `rule`."""

    rule: str
    example: str


class Row(NamedTuple):
    """One row of a raw file: its place (`FILE:LINE`), a key for its default id, and its columns,
    what is wrong with it, or why it is left out."""

    where: str
    key: str
    columns: dict[str, Any] | DataError | Skipped


# Where a record stands, and the record, what is wrong with it, or the rule that left it out.
Found = tuple[str, Record | DataError | Skipped]
Format = Callable[[Path, SourceConfig], Iterator[Row]]


def source_name(source: SourceConfig, path: Path) -> str:
    """What records without a `source` get: the recipe's name, else the file's first part."""
    return source.name or path.name.split(".")[0] or path.name


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


def few(names: Iterable[str]) -> str:
    """Names for a message: at most a dozen, each of bounded length."""
    listed = list(names)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return ", ".join(f"{name:.40}" for name in listed[:12]) + more


def shorten(text: str) -> str:
    """At most EXAMPLE_CHARS characters of it."""
    return text if len(text) <= EXAMPLE_CHARS else text[: EXAMPLE_CHARS - 3] + "..."
