"""Plain text: a file, or every .txt and .md below a folder, cut into paragraphs at empty lines.

A row has `text`, `file` (path below the folder) and `paragraph` (number in the file).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.reading import Row, files_below, numbered_lines
from lbr_ds.errors import DataError


def read_text(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row a paragraph, `where` being its first line."""
    for file in files_below(path, (".txt", ".md", ".txt.gz")):
        inside = file.relative_to(path).as_posix() if path.is_dir() else file.name
        for count, (number, text) in enumerate(_paragraphs(file), 1):
            where = f"{file}:{number}"
            if isinstance(text, DataError):
                yield Row(where, f"{inside}-{count}", text)
            else:
                row = {"text": text, "file": inside, "paragraph": count}
                yield Row(where, f"{inside}-{count}", row)


def _paragraphs(file: Path) -> Iterator[tuple[int, str | DataError]]:
    """Each paragraph, or what is wrong with it, with the number of its first line."""
    lines: list[bytes] = []
    number = first = 0
    for number, line in numbered_lines(file):
        if isinstance(line, DataError):
            yield number, line
        elif line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield first, _decoded(lines, file, first)
            lines = []
    if lines:
        yield first, _decoded(lines, file, first)


def _decoded(lines: list[bytes], file: Path, first: int) -> str | DataError:
    for number, line in enumerate(lines, first):
        try:
            line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return DataError(f"{file}:{number}: not UTF-8 at byte {error.start} of the line")
    return b"".join(lines).decode("utf-8-sig")
