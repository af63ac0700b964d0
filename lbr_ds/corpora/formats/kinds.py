"""The kind of a file by its first bytes, and what to do if this kind cannot be read."""

from __future__ import annotations

import stat
from pathlib import Path

from lbr_ds.errors import DataError

_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", "add `format: parquet` to this entry of data.sources"),
    (b"ARROW1", "an Arrow file", "add `format: arrow` to this entry of data.sources"),
    (b"PK\x03\x04", "a zip archive (or .xlsx, .docx, .npz)", "unpack it, or save a sheet as CSV"),
    (b"BZh", "bzip2 data", "decompress it; only gzip is read directly"),
    (b"\xfd7zXZ\0", "xz data", "decompress it; only gzip is read directly"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "decompress it; only gzip is read directly"),
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
