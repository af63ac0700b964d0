"""Read JSON, plain or gzipped, as a stream of objects; each is a row.

A file has one object per line, one array of objects, or objects that span several lines. Where an
array of texts takes the place of an object, it is (anchor, positive, negatives...), as
sentence-transformers has it.

A file of lines that is not zipped is read in pieces. A line that is not an object is an invalid
row. A file that cannot be read, as a truncated gzip or an array that is not JSON, raises DataError;
in a folder its unreadable rest is one invalid row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lbr_ds.config import SourceConfig
from lbr_ds.corpora.formats.interface import (
    File,
    Format,
    Parts,
    Piece,
    Place,
    Row,
    files_of,
    lost_rows,
    size_of,
)
from lbr_ds.corpora.formats.lines import MAX_LINE, chunks, cut_lines, head, numbered_lines
from lbr_ds.errors import DataError

_BETWEEN = re.compile(r"[ \t\r\n,]*")  # between two values
_WHOLE = (
    "if it is around the array of the records, write these to a file of their own, one a line: "
    "jq -c '.KEY[]' FILE > NEW.jsonl"
)
_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".json.gz", ".json")
_Object = tuple[str, int, dict[str, Any] | DataError]  # place, number, value or error
_UNFINISHED = 16  # an error so close to the end of the text read may come from reading more


def _cut(path: Place, source: SourceConfig, first: Piece | None) -> Iterator[Piece]:
    """Yield the pieces of a file, or of all files below a folder that are not empty."""
    files = files_of(path, _SUFFIXES, first)
    for file in [file for file in files if size_of(file)] or files[:1]:
        piece = Piece.of(file)
        try:
            if first and first.end and first.file == piece.file:
                yield from cut_lines(file, source.encoding, first)
            elif _is_spread(head(file, source.encoding)):
                yield piece
            else:
                yield from cut_lines(file, source.encoding)
        except DataError as error:
            if not path.is_dir():
                raise
            yield piece._replace(fault=str(error))


def _read(path: Place, source: SourceConfig, piece: Piece) -> Iterator[Row]:
    file = piece.place
    prefix = f"{file.name.split('.')[0]}-" if path.is_dir() else ""
    try:
        if piece.fault:
            raise DataError(piece.fault)
        spread = not piece.end and _is_spread(head(file, source.encoding))
        rows = _objects if spread else _lines
        for where, key, columns in rows(file, source.encoding, piece):
            yield Row(where, f"{prefix}{key}", columns)
    except DataError as error:
        if not path.is_dir():
            raise
        yield lost_rows(file, prefix, error)


def _lines(file: File, encoding: str, piece: Piece) -> Iterator[_Object]:
    for number, line in numbered_lines(file, encoding, piece):
        where = f"{file}:{number}"
        if isinstance(line, DataError):
            too_long = number == 1 and not line.text  # perhaps the whole file
            yield where, number, DataError(f"{line}; {_WHOLE}") if too_long else line
        elif line.strip():
            yield where, number, _parse(line, where)


def _parse(line: str, where: str) -> dict[str, Any] | DataError:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "" if line.lstrip()[:1] in "{[" else "; check data.sources.format"
        return DataError(f"{where}: not JSON ({error}){hint}")
    return _object(raw, where, "\\ud" in line or "\\uD" in line)


def _named(raw: Any) -> Any:
    """Return an array of at least two texts as an object; any other value as it is."""
    if not isinstance(raw, list) or len(raw) < 2 or not all(isinstance(one, str) for one in raw):
        return raw
    return {"anchor": raw[0], "positive": raw[1], **({"negative": raw[2:]} if raw[2:] else {})}


def _object(raw: Any, where: str, doubtful: bool) -> dict[str, Any] | DataError:
    """Return the value or its error; doubtful: whether a surrogate may be unpaired."""
    if isinstance(raw, list):
        raw = _named(raw)
    if not isinstance(raw, dict):
        return DataError(f"{where}: a record must be a JSON object, not {type(raw).__name__}")
    if doubtful:
        try:
            json.dumps(raw, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return DataError(f"{where}: contains an unpaired UTF-16 surrogate (\\ud...)")
    return raw


def _is_spread(start: str) -> bool:
    """Return whether a file that begins so is an array, or has objects that span lines."""
    first, _, rest = start.lstrip().partition("\n")
    if not first.startswith("{"):
        return first.startswith("[") and not (rest.lstrip().startswith("[") and _is_texts(first))
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        # A string cannot continue on the next line: a line that ends inside one is truncated.
        whole = error.pos < len(first.rstrip()) or error.msg.startswith("Unterminated")
        return not whole and bool(rest.strip()) and not rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        pass
    return False


def _is_texts(line: str) -> bool:
    """Return whether a line is an array of at least two texts."""
    try:
        return isinstance(_named(json.loads(line)), dict)
    except (ValueError, RecursionError):
        return False


def _objects(file: File, encoding: str, piece: Piece) -> Iterator[_Object]:
    """Yield the objects of a file that span lines, each with the number of its first line."""
    for number, (line, raw, text) in enumerate(_values(file, encoding, piece), 1):
        where = f"{file}:{line}: item {number}"
        yield where, number, _object(raw, where, "\\ud" in text or "\\uD" in text)


class _Text:
    """The unused text that has been read of a file: `text` from `place` on, which is in `line`."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self.text, self.place, self.line, self.ended = "", 0, 1, False

    def go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def grow(self) -> None:
        """Read at least as much as is held, so that a long value costs twice its length."""
        parts = [self.text[self.place :]]
        wanted = len(parts[0])
        while wanted >= 0 and not self.ended:
            piece = next(self._source, None)
            self.ended = piece is None
            parts.append(piece or "")
            wanted -= len(parts[-1])
        self.text, self.place = "".join(parts), 0


def _values(file: File, encoding: str, piece: Piece) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, value, its text) of each value, and of each item of an array.

    Holds one value of at most MAX_LINE bytes, and a piece of the file.
    """
    decode = json.JSONDecoder().raw_decode
    read, inside = _Text(chunks(file, encoding, piece)), False
    while True:
        read.go_to(_BETWEEN.match(read.text, read.place).end())  # type: ignore[union-attr]
        if read.place == len(read.text):
            if read.ended and inside:
                raise DataError(f"{file}: ends before its array is closed; fetch it again")
            if read.ended:
                return
            read.grow()
        elif read.text[read.place] == ("]" if inside else "["):
            inside = not inside
            read.go_to(read.place + 1)
        else:
            try:
                value, end = decode(read.text, read.place)
            except (ValueError, RecursionError) as error:
                if read.ended or not _is_cut(error, read):
                    raise DataError(_fault(error, read, file)) from None
                end = len(read.text)
            if end < len(read.text) or read.ended:  # else it may continue
                yield read.line, value, read.text[read.place : end]
                read.go_to(end)
            else:
                read.grow()


def _is_cut(error: Exception, read: _Text) -> bool:
    """Return whether an error may be caused by the end of the text read."""
    if not isinstance(error, json.JSONDecodeError) or len(read.text) - read.place > MAX_LINE:
        return False
    return error.msg.startswith("Unterminated") or error.pos > len(read.text) - _UNFINISHED


def _fault(error: Exception, read: _Text, file: File) -> str:
    if len(read.text) - read.place > MAX_LINE:
        return f"{file}:{read.line}: the object here is longer than {MAX_LINE >> 20} MiB; {_WHOLE}"
    place = getattr(error, "pos", read.place)
    line = read.line + read.text.count("\n", read.place, place)
    return f"{file}:{line}: not JSON ({getattr(error, 'msg', error)})"


_PARTS = Parts(_cut, _read, _SUFFIXES)
JSONL = Format(_PARTS.all, parts=_PARTS)
