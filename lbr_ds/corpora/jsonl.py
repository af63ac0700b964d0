"""JSON lines, plain or gzipped, one record a line as `records.py` has them.

`source` may be left out (the recipe's name stands in) and so may `id` ("NAME-LINE").
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.reading import Found, source_name
from lbr_ds.errors import DataError
from lbr_ds.records import Record


def read_jsonl(path: Path, source: SourceConfig) -> Iterator[Found]:
    """Yield `FILE:LINE` with the record, or with the DataError that says what is wrong with it.

    Raises DataError when the file itself cannot be read (a cut gzip, a folder).
    """
    name = source_name(source, path)
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            raw = _parse(line, where)
            if isinstance(raw, dict):
                raw = {"id": f"{name}-{number}", "source": name, **raw}
            yield where, Record.from_dict(raw, where)
        except DataError as error:
            yield where, error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1."""
    # Told by the content: a cached or renamed file may have lost its suffix.
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read to its end ({error}); fetch it again") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        raw = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():
            json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a surrogate pair (\\ud...)") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    return raw
