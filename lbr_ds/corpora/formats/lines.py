"""Read the lines of a text file, or its text in pieces: plain or gzipped, in any encoding.

A file of another kind (Parquet, a zip archive, an HTML page) is refused with its kind, and text in
another encoding than the recipe's with the encoding that fits.
"""

from __future__ import annotations

import codecs
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from lbr_ds.corpora.formats import interface
from lbr_ds.corpora.formats.interface import File, Piece, size_of
from lbr_ds.corpora.formats.kinds import kind_of
from lbr_ds.errors import DataError, short
from lbr_ds.system.locate import refetch_hint
from lbr_ds.system.remote_files import RemoteFile

WHOLE = Piece()
MAX_LINE = 1 << 26  # bytes; a longer line is invalid and not held in memory
_HEAD = 1 << 16  # bytes from which the kind of file is detected
_CHUNK = 1 << 20
_SAMPLE_LINES, _SAMPLE_BYTES = 200, 1000  # of undecodable text whose encoding is guessed
# Candidates for text in another encoding; of equally likely ones the first.
_ENCODINGS = (
    "utf-8",
    "gb18030",
    "shift_jis",
    "euc_jp",
    "big5",
    "cp949",
    "cp1252",
    "cp1250",
    "cp1251",
    "koi8_r",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "cp874",
    "iso2022_jp",
)
_MARKS = (
    ("utf-32", codecs.BOM_UTF32_LE),
    ("utf-32", codecs.BOM_UTF32_BE),
    ("utf-16", codecs.BOM_UTF16_LE),
    ("utf-16", codecs.BOM_UTF16_BE),
)


class BadLine(DataError):
    """A line that cannot be read; `text` is what can be read of it."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


def numbered_lines(
    path: File, encoding: str = "utf-8", piece: Piece = WHOLE
) -> Iterator[tuple[int, str | BadLine]]:
    """Yield the lines of a file with their ends, numbered from 1, without a byte order mark.

    A line that is longer than MAX_LINE or not in `encoding` is yielded as a BadLine.

    Args:
        path: The file.
        encoding: Its encoding.
        piece: One of `cut_lines`, if only that part is to be read.

    Raises:
        DataError: The file cannot be read, is of another kind, or is mostly in another encoding.
    """
    number, hint, left = piece.rows, "", piece.end - piece.begin or sys.maxsize
    with _opened(path, encoding, piece) as (file, coded):
        while left > 0 and (line := file.readline(MAX_LINE)):
            number += 1
            left -= len(line)
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                    left -= len(line)
                yield number, BadLine(f"{path}:{number}: longer than {MAX_LINE >> 20} MiB")
                continue
            try:
                text = line.decode(coded)
            except UnicodeDecodeError as error:
                hint = hint or _other_encoding(path, encoding, number, line)
                message = f"{path}:{number}: not {coded.upper()} at byte {error.start} of the line"
                yield number, BadLine(f"{message}; {hint}", line.decode(coded, "replace"))
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def cut_lines(path: File, encoding: str = "utf-8", first: Piece | None = None) -> Iterator[Piece]:
    """Yield the pieces of a file, which end at line ends; one if it must be read from its start.

    Args:
        path: The file. The pieces of a remote one hold their bytes.
        encoding: Its encoding.
        first: The piece to begin with.

    Raises:
        DataError: As `numbered_lines` does.
    """
    size, piece = size_of(path), Piece.of(path)
    if first and first.end:
        piece = piece._replace(begin=first.begin, end=size, rows=first.rows)
    elif size <= interface.PIECE_BYTES:
        yield piece
        return
    with _opened(path, encoding, piece) as (file, _):
        if not isinstance(file, _Plain):
            yield piece
            return
        while parts := _to_line_end(file):
            length = sum(map(len, parts))
            piece = piece._replace(end=piece.begin + length, length=length)
            held = isinstance(path, RemoteFile) and length <= MAX_LINE
            yield piece._replace(data=b"".join(parts)) if held else piece
            lines = sum(part.count(b"\n") for part in parts)
            piece = piece._replace(begin=piece.end, rows=piece.rows + lines)


def _to_line_end(file: _Plain) -> list[bytes]:
    """Read PIECE_BYTES and the rest of the line; return the parts, nothing at the end."""
    parts = [file.read(interface.PIECE_BYTES)]
    while parts[-1] and not parts[-1].endswith(b"\n"):
        parts.append(file.readline(_HEAD))
    return [part for part in parts if part]


def chunks(path: File, encoding: str = "utf-8", piece: Piece = WHOLE) -> Iterator[str]:
    """Yield the text of a file in chunks of about a megabyte; the piece is the whole file.

    Raises:
        DataError: As `numbered_lines` does, and for any text that is not in `encoding`.
    """
    with _opened(path, encoding, piece) as (file, coded):
        decoder = codecs.getincrementaldecoder(coded)()
        done, first = 0, True
        while True:
            raw = file.read(_HEAD if piece.few else _CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                place = f"{path}: not {coded.upper()} near byte {done + error.start}"
                start = max(error.start, raw.rfind(b"\n", 0, error.start) + 1)
                fault = raw[start : start + _SAMPLE_BYTES].split(b"\n")[0]
                hint = _other_encoding(path, encoding, 0, fault)
                raise DataError(f"{place}; {hint}") from None
            yield text.removeprefix("\ufeff") if first else text
            if not raw:
                return
            done, first = done + len(raw), False


def head(path: File, encoding: str = "utf-8") -> str:
    """Return the beginning of a file's text; what cannot be decoded is replaced."""
    with _opened(path, encoding, end=_HEAD) as (file, coded):
        return file.read(_HEAD).decode(coded, "replace").removeprefix("\ufeff")


class _Plain(io.BufferedReader):
    """A file in which every byte can be reached: neither zipped nor recoded."""


class _Recoded:
    """Text of two or four bytes per character, with the interface of a binary file in UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def readline(self, limit: int) -> bytes:
        return self._text.readline(limit).encode()

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode()


def _raw(path: File, piece: Piece, end: int) -> IO[bytes]:
    """Open a file where a piece begins; of a remote one, only the piece or what is before `end`."""
    if piece.data:
        return io.BytesIO(piece.data)
    if isinstance(path, RemoteFile):
        last = min(end or piece.end or path.size, path.size)
        return path.open(piece.begin, last, few=piece.few)
    file = path.open("rb", buffering=0)
    file.seek(piece.begin)
    return file


@contextmanager
def _opened(
    path: File, encoding: str, piece: Piece = WHOLE, end: int = 0
) -> Iterator[tuple[io.BufferedReader[Any] | _Recoded, str]]:
    """Yield the unzipped bytes of a file and the name of their encoding.

    Text of two or four bytes per character is converted to UTF-8, where lines end in one byte.

    Args:
        path: The file.
        encoding: Its encoding.
        piece: The piece with which reading begins. If it has an end, the file is plain text.
        end: The bytes that are needed, 0 for all.
    """
    coded = codecs.lookup(encoding).name
    coded = "utf-8" if coded == "utf-8-sig" else coded
    try:
        with _raw(path, piece, end) as file:
            raw: io.BufferedReader[Any] = _Plain(file, _HEAD)  # type: ignore[arg-type]
            if piece.end:
                yield raw, coded
                return
            if raw.peek(2)[:2] == b"\x1f\x8b":  # by content: a cached file may have no suffix
                raw = io.BufferedReader(gzip.GzipFile(fileobj=raw), _HEAD)
            if len("\n".encode(coded)) > 1:
                yield _Recoded(io.TextIOWrapper(raw, coded, newline="\n")), "utf-8"
            else:
                _refuse_foreign(path, raw.peek(_HEAD)[:_HEAD])
                yield raw, coded
    except UnicodeError as error:
        raise DataError(
            f"{path}: cannot be decoded as {coded} ({error}); set the right `encoding:` in this "
            "entry of data.sources"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        system = isinstance(error, OSError) and error.errno is not None
        cure = (
            "check the disk and the file's permissions" if system else "replace it by a good copy"
        )
        raise DataError(
            f"{path}: cannot be read to its end ({short(error)}){refetch_hint(path) or f'; {cure}'}"
        ) from None


def _refuse_foreign(path: File, start: bytes) -> None:
    """Raise DataError for a file that cannot be text with one byte per line end."""
    if kind := kind_of(start):
        raise DataError(f"{path}: is {kind[0]}; {kind[1]}")
    wide = next((name for name, mark in _MARKS if start.startswith(mark)), "")
    zeros = start[::2].count(0), start[1::2].count(0)
    if not wide and sum(zeros) > len(start) // 50 and max(zeros) > 20 * min(zeros) + 4:
        wide = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"  # half of each blank, of a comma
    if wide:
        raise DataError(
            f"{path}: is {wide.upper()} text; in the recipe, add `encoding: {wide}` to this entry "
            "of data.sources"
        )
    if b"\r" in start.strip() and b"\n" not in start:
        raise DataError(
            f"{path}: its lines end in a carriage return alone, as on old Macs; "
            "convert them, for example with `tr '\\r' '\\n'`"
        )


def _other_encoding(path: File, encoding: str, number: int, line: bytes) -> str:
    """Return the encoding that a line seems to have, as a hint for the user.

    Raises:
        DataError: Most lines at the beginning of the file are not in `encoding` either.
    """
    with _opened(path, encoding, end=_HEAD) as (file, coded):
        sample = file.read(_HEAD)
    lines = [one for one in sample.split(b"\n") if one.strip()]
    if len(sample) == _HEAD and len(lines) > 1:
        del lines[-1]  # cut
    bad = [one for one in lines if not _decodes(one, coded)]
    likely, looks = _guess(b"\n".join(bad[:_SAMPLE_LINES]) or line.removesuffix(b"\n"), coded)
    if not likely:
        return (
            "no other common encoding fits either; repair the file, or add its `encoding:` to "
            "this entry of data.sources in the recipe"
        )
    hint = (
        f"it can be decoded as {likely} ({looks!r}): in the recipe, add `encoding: {likely}` to "
        "this entry of data.sources"
    )
    if number and len(bad) > len(lines) / 2:
        raise DataError(f"{path}:{number}: not {coded.upper()}; {hint}")
    return f"{hint}, provided that the whole file can"


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _guess(sample: bytes, but: str) -> tuple[str, str]:
    """Return the likeliest encoding of a text, and a part of it in it; empty if none fits."""
    from charset_normalizer import from_bytes

    tried = [name for name in _ENCODINGS if name != but]
    for cut in range(4):  # the sample may end within a letter
        if matches := list(from_bytes(sample[: len(sample) - cut], cp_isolation=tried)):
            break
    else:
        return "", ""
    best = matches[0]
    equal = {
        name.replace("utf_8", "utf-8")
        for match in matches
        if match.chaos <= best.chaos + 0.02 and match.coherence >= best.coherence - 0.02
        for name in match.could_be_from_charset
    }
    name = min(equal & set(tried), key=tried.index, default=best.encoding)
    text = sample.decode(name, "replace")
    first = next((place for place, letter in enumerate(text) if not letter.isascii()), 0)
    return name, " ".join(text[max(0, first - 10) : first + 20].split())
