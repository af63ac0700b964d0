"""What a reader is, and the tally of what was left out and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.errors import DataError
from lbr_ds.records import Record

# Where a record stands (`FILE:LINE`), and the record or what is wrong with it.
Found = tuple[str, Record | DataError]
Reader = Callable[[Path, SourceConfig], Iterator[Found]]
Progress = Callable[[str, int, int | None], None]  # stage, done, total or None
EXAMPLES = 3


def source_name(source: SourceConfig, path: Path) -> str:
    """What records without a `source` get: the recipe's name, else the file's first part."""
    return source.name or path.name.split(".")[0] or path.name


class Tally:
    """How often each rule left something out, with the first examples."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, rule: str, example: str) -> None:
        """Count one thing left out by `rule`."""
        self.counts[rule] = self.counts.get(rule, 0) + 1
        kept = self.examples.setdefault(rule, [])
        if len(kept) < EXAMPLES:
            kept.append(example if len(example) <= 160 else example[:157] + "...")

    def plain(self) -> dict[str, Any]:
        """{rule: {count, examples}}, rules in alphabetical order."""
        return {
            rule: {"count": self.counts[rule], "examples": self.examples[rule]}
            for rule in sorted(self.counts)
        }
