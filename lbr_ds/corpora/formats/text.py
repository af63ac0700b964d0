"""Read plain text: a file, or every .txt and .md below a folder, split at empty lines.

A row is a paragraph: `text`, `file` (path below the folder) and `paragraph` (number in the file).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row, files_below
from lbr_ds.corpora.formats.lines import BadLine, numbered_lines
from lbr_ds.errors import DataError


def read_text(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row per paragraph; `where` is its first line."""
    for file in files_below(path, (".txt", ".md", ".txt.gz")):
        inside = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for count, (number, text) in enumerate(_paragraphs(file, source.encoding), 1):
            where = f"{file}:{number}"
            if isinstance(text, DataError):
                yield Row(where, f"{inside}-{count}", text)
            else:
                row = {"text": text, "file": inside, "paragraph": count}
                yield Row(where, f"{inside}-{count}", row)


def _paragraphs(file: Path, encoding: str) -> Iterator[tuple[int, str | DataError]]:
    """Yield each paragraph, or its error, with the number of its first line."""
    lines: list[str] = []
    number = first = 0
    fault: DataError | None = None
    for number, line in numbered_lines(file, encoding):
        text = line.text if isinstance(line, BadLine) else line
        fault = fault or (line if isinstance(line, BadLine) else None)
        if text.strip():
            first = first if lines else number
            lines.append(text)
            continue
        if lines or fault:
            yield first if lines else number, fault or "".join(lines)
        lines, fault = [], None
    if lines or fault:
        yield first if lines else number, fault or "".join(lines)


TEXT = Format(
    read_text,
    suffixes=(".txt", ".md"),
    columns=ColumnsConfig(text="text", group="file"),
    shape="passages",
)
