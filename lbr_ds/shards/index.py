"""tar -> where each record lies in it: an array of (offset, size), kept beside the tar as `.idx`.

Layout of an index: 8 bytes magic, the tar's length and the number of records (two little-endian
u64), then one (offset, size) pair of little-endian i64 a record. It is a cache: when it is missing
or stale (tar newer, or of another length) it is built again from the tar's headers.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import DataError

_MAGIC = b"LBRIDX1\n"
_HEAD = struct.Struct("<8sQQ")
_BLOCK = 512  # tar's unit
_ORDINARY = (b"0", b"\0")  # type flags of a plain file


def index_of(tar: Path, descriptor: int, name: str) -> NDArray[np.int64]:
    """(records, 2) offsets and sizes in bytes of the `.json` members of a tar, in file order.

    descriptor: the open tar, which may have left its folder since; name: the tar in messages.
    Reads the index file, or scans the tar and leaves an index where the folder may be written.
    Raises DataError for a damaged tar.
    """
    found = _load(tar, os.fstat(descriptor))
    if found is None:
        found = scan(descriptor, name)
        save(tar, found)
    return found


def save(tar: Path, spans: NDArray[np.int64]) -> None:
    """Write the index of `tar` in one rename; a folder that cannot be written is left as it is."""
    path = tar.with_suffix(".idx")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        head = _HEAD.pack(_MAGIC, tar.stat().st_size, len(spans))
        part.write_bytes(head + spans.astype("<i8").tobytes())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # only a cache: the next reader scans again


def _load(tar: Path, state: os.stat_result) -> NDArray[np.int64] | None:
    """The index as kept, or None when it is missing, stale or damaged."""
    path = tar.with_suffix(".idx")
    try:
        raw, age = path.read_bytes(), path.stat().st_mtime_ns
    except OSError:
        return None
    if len(raw) < _HEAD.size or age < state.st_mtime_ns:
        return None
    magic, length, count = _HEAD.unpack_from(raw)
    if magic != _MAGIC or length != state.st_size or len(raw) != _HEAD.size + 16 * count:
        return None
    spans = np.frombuffer(raw, dtype="<i8", offset=_HEAD.size).reshape(count, 2).astype(np.int64)
    inside = spans.min(initial=0) >= 0 and spans.sum(axis=1).max(initial=0) <= length
    return spans if inside else None


def scan(descriptor: int, name: str) -> NDArray[np.int64]:
    """Walk the headers of the open tar once. Returns the same array as `index_of`."""
    spans: list[tuple[int, int]] = []
    place = 0
    while True:
        header = os.pread(descriptor, _BLOCK, place)
        if header == bytes(_BLOCK):
            break
        size = _size(name, header, place)
        start = place + _BLOCK
        if header[156:157] in _ORDINARY and header[:100].rstrip(b"\0").endswith(b".json"):
            spans.append((start, size))
        place = start + -(-size // _BLOCK) * _BLOCK
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _size(name: str, header: bytes, place: int) -> int:
    """The size of the member under `header`; raises DataError when that is not a tar header."""
    if len(header) < _BLOCK:
        raise DataError(f"{name}: ends at byte {place + len(header)} with no end mark; truncated")
    # The checksum counts its own eight bytes as blanks.
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        stated = int(header[148:156].strip(b" \0"), 8)
        size = int(header[124:136].strip(b" \0"), 8)
    except ValueError:
        stated, size = -1, 0
    if total != stated:
        raise DataError(f"{name}: no tar header at byte {place}; the file is damaged")
    return size
