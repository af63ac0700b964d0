"""Read the lines of a text file, or its text in pieces: plain or gzipped, in any encoding.

A file of another kind (Parquet, a zip archive, an HTML page) is refused with its kind, and text in
another encoding than the recipe's with the encoding that fits.
"""

from __future__ import annotations

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lbr_ds.errors import DataError, short
from lbr_ds.system.locate import refetch_hint

MAX_LINE = 1 << 26  # bytes; a longer line is invalid and not held in memory
_HEAD = 1 << 16  # bytes from which the kind of file is detected
_PIECE = 1 << 20
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
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", "add `format: parquet` to this entry of data.sources"),
    (b"ARROW1", "an Arrow file", "add `format: arrow` to this entry of data.sources"),
    (b"PK\x03\x04", "a zip archive (or .xlsx, .docx, .npz)", "unpack it, or save a sheet as CSV"),
    (b"BZh", "bzip2 data", "unpack it; only gzip is read as it is"),
    (b"\xfd7zXZ\0", "xz data", "unpack it; only gzip is read as it is"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "unpack it; only gzip is read as it is"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as CSV or as text"),
    (b"{\\rtf", "an RTF document", "save it as text"),
    (b"SQLite format 3\0", "an SQLite database", "export its table as CSV"),
    (b"\x89HDF", "an HDF5 file", "save it as Parquet or JSON lines"),
    (b"\x93NUMPY", "a NumPy file", "save it as Parquet or JSON lines"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (b"<!doctype html", "an HTML page, perhaps of an error or a login", "fetch the file itself"),
    (b"<html", "an HTML page, perhaps of an error or a login", "fetch the file itself"),
    (b"<?xml", "an XML file", "convert it to JSON lines"),
)
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
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


def numbered_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str | BadLine]]:
    """Yield the lines of a file with their ends, numbered from 1, without a byte order mark.

    A line that is longer than MAX_LINE or not in `encoding` is yielded as a BadLine.

    Raises:
        DataError: The file cannot be read, is of another kind, or is mostly in another encoding.
    """
    number, hint = 0, ""
    with _opened(path, encoding) as (file, coded):
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
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


def pieces(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of a file in pieces of about a megabyte.

    Raises:
        DataError: As `numbered_lines` does, and for any text that is not in `encoding`.
    """
    with _opened(path, encoding) as (file, coded):
        decoder = codecs.getincrementaldecoder(coded)()
        done, first = 0, True
        while True:
            raw = file.read(_PIECE)
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


def head(path: Path, encoding: str = "utf-8") -> str:
    """Return the beginning of a file's text; what cannot be decoded is replaced."""
    with _opened(path, encoding) as (file, coded):
        return file.read(_HEAD).decode(coded, "replace").removeprefix("\ufeff")


def kind_of(start: bytes) -> tuple[str, str] | None:
    """Return the kind of a file that begins so and the cure; None for what may be text."""
    plain = start.lstrip().lower()
    for magic, name, cure in _KINDS:
        if start.startswith(magic) or (magic.isascii() and plain.startswith(magic.lower())):
            return name, cure
    if start.startswith(_PICKLES):
        return "a pickle, which could run code when it is opened", "save it as JSON lines"
    if start[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    return None


def check_file(path: Path) -> None:
    """Raise DataError for what is neither a file nor a folder, such as a pipe."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kinds = {
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        raise DataError(
            f"{path}: is {kinds.get(stat.S_IFMT(mode), 'no file')}; data.sources.path must be a "
            "file or folder, since it is read more than once"
        )


class _Recoded:
    """Text of two or four bytes per character, with the interface of a binary file in UTF-8."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def readline(self, limit: int) -> bytes:
        return self._text.readline(limit).encode()

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode()


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[tuple[BinaryIO | _Recoded, str]]:
    """Yield the unzipped bytes of a file and the name of their encoding.

    Text of two or four bytes per character is converted to UTF-8, where lines end in one byte.
    """
    coded = codecs.lookup(encoding).name
    coded = "utf-8" if coded == "utf-8-sig" else coded
    try:
        with path.open("rb") as file:  # by content: a cached file may have no suffix
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            raw = io.BufferedReader(file, _HEAD)
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


def _refuse_foreign(path: Path, start: bytes) -> None:
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


def _other_encoding(path: Path, encoding: str, number: int, line: bytes) -> str:
    """Return the encoding that a line seems to have, as a hint for the user.

    Raises:
        DataError: Most lines at the beginning of the file are not in `encoding` either.
    """
    with _opened(path, encoding) as (file, coded):
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
