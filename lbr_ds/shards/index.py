"""tar -> where each record lies in it and its checksum, kept beside the tar as `.idx`.

Layout of an index: 8 bytes magic, the sha256 of the tar (32 bytes), its length and the number of
records (two little-endian u64); then for each record its offset and size (two little-endian i64),
then for each its CRC-32 (little-endian u32). An index is only ever made from a tar that has the
manifest's sha256, so a tar that is damaged later is found out record by record. It is a cache: one
that is missing or of another tar is made again from the whole tar.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.system.atomic import atomic_file

_MAGIC = b"LBRIDX2\n"
_HEAD = struct.Struct("<8s32sQQ")
_BLOCK = 512  # tar's unit
_PIECE = 1 << 20  # bytes read at once to hash a tar
_ORDINARY = (b"0", b"\0")  # type flags of a plain file


class Index(NamedTuple):
    """The `.json` members of a tar in file order, n of them."""

    spans: NDArray[np.int64]  # (n, 2) offsets and sizes in bytes
    checksums: NDArray[np.uint32]  # (n,) CRC-32 of each member's bytes


def index_of(tar: Path, descriptor: int, name: str, sha256: str) -> Index:
    """The index of a tar that had this sha256 when it was made.

    descriptor: the open tar, which may have left its folder since; name: the tar in messages.
    Reads the index file, or the whole tar, and then leaves an index where the folder may be
    written. Raises DataError for a tar that has no index and is not the one of that sha256.
    """
    found = _load(tar, sha256)
    if found is None:
        if (now := _hash(descriptor)) != sha256:
            scan(descriptor, name)  # names the place where it can
            raise DataError(
                f"{name}: altered, sha256 {now[:12]}.. and not the manifest's {sha256[:12]}.., and "
                "no .idx file tells which records; copy the file again or run `lbr-ds prepare`"
            )
        found = make(descriptor, name)
        save(tar, found, sha256)
    return found


def make(descriptor: int, name: str) -> Index:
    """The index of an open tar, whose bytes are taken to be right. Raises DataError."""
    spans = scan(descriptor, name)
    sums = [zlib.crc32(os.pread(descriptor, size, offset)) for offset, size in spans.tolist()]
    return Index(spans, np.array(sums, dtype=np.uint32))


def save(tar: Path, found: Index, sha256: str) -> None:
    """Write the index of `tar` in one rename; a folder that cannot be written is left as it is."""
    path = tar.with_suffix(".idx")
    try:
        length, count = tar.stat().st_size, len(found.spans)
        head = _HEAD.pack(_MAGIC, bytes.fromhex(sha256), length, count)
        body = found.spans.astype("<i8").tobytes() + found.checksums.astype("<u4").tobytes()
        with atomic_file(path) as file:
            file.write(head + body)
    except OSError:
        pass  # only a cache: the next reader makes it again


def _load(tar: Path, sha256: str) -> Index | None:
    """The index as kept, or None when it is missing, damaged or of another tar."""
    try:
        raw = tar.with_suffix(".idx").read_bytes()
    except OSError:
        return None
    if len(raw) < _HEAD.size:
        return None
    magic, made_of, length, count = _HEAD.unpack_from(raw)
    if magic != _MAGIC or made_of.hex() != sha256 or len(raw) != _HEAD.size + 20 * count:
        return None
    spans = np.frombuffer(raw, "<i8", 2 * count, _HEAD.size).reshape(count, 2).astype(np.int64)
    sums = np.frombuffer(raw, "<u4", count, _HEAD.size + 16 * count).astype(np.uint32)
    inside = spans.min(initial=0) >= 0 and spans.sum(axis=1).max(initial=0) <= length
    return Index(spans, sums) if inside else None


def _hash(descriptor: int) -> str:
    """The sha256 of an open file, in hex."""
    digest, place = hashlib.sha256(), 0
    while piece := os.pread(descriptor, _PIECE, place):
        digest.update(piece)
        place += len(piece)
    return digest.hexdigest()


def scan(descriptor: int, name: str) -> NDArray[np.int64]:
    """Walk the headers of the open tar once. Returns `Index.spans`."""
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
