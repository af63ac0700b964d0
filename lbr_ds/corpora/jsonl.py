"""JSON lines, plain or gzipped: one object a line is one row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.reading import Row, files_below, numbered_lines
from lbr_ds.errors import DataError


def read_jsonl(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield the row of each line that is not blank; of a folder, those of its files in turn.

    Raises DataError when a file itself cannot be read (a cut gzip).
    """
    for file in files_below(path, (".jsonl", ".jsonl.gz", ".json.gz", ".json")):
        prefix = f"{file.name.split('.')[0]}-" if path.is_dir() else ""
        for number, line in numbered_lines(file):
            where = f"{file}:{number}"
            if isinstance(line, DataError) or line.strip():
                yield Row(where, f"{prefix}{number}", _parse(line, where))


def _parse(line: bytes | DataError, where: str) -> dict[str, Any] | DataError:
    if isinstance(line, DataError):
        return line
    try:
        raw = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except UnicodeEncodeError:
        return DataError(f"{where}: holds half a surrogate pair (\\ud...)")
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not JSON ({error})")
    if not isinstance(raw, dict):
        return DataError(f"{where}: a record must be a JSON object, not {type(raw).__name__}")
    return raw
