"""Index tars: the offset and checksum of each record, stored beside the tar as `.idx`.

Format of an index: 8 bytes magic, the sha256 of the tar (32 bytes), its length and the number of
records (two little-endian u64); then for each record its offset and size (two little-endian i64),
then for each its CRC-32 (little-endian u32). An index is only made from a tar that has the
manifest's sha256, so that later damage is detected record by record. It is a cache: one that is
missing or of another tar is made again from the whole tar.
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
    """Return the index of a tar, from the index file or else from the whole tar.

    In the latter case the index is stored, if the folder is writable.

    Args:
        tar: The path of the tar.
        descriptor: The open tar, which may have been removed from its folder since.
        name: The tar's name in messages.
        sha256: What the tar had when it was made.

    Raises:
        DataError: There is no index, and the tar has another sha256.
    """
    index = load(tar, sha256)
    if index is None:
        if (now := _hash(descriptor)) != sha256:
            scan(descriptor, name)  # names the place where it can
            raise DataError(
                f"{name}: altered: its sha256 is {now[:12]}.., but the manifest lists "
                f"{sha256[:12]}..; there is no .idx file to locate the damaged records: copy the "
                "file again or run `lbr-ds prepare`"
            )
        index = make(descriptor, name)
        save(tar, index, sha256)
    return index


def make(descriptor: int, name: str) -> Index:
    """Return the index of an open tar that is assumed to be intact; may raise DataError."""
    spans = scan(descriptor, name)
    sums = [zlib.crc32(os.pread(descriptor, size, offset)) for offset, size in spans.tolist()]
    return Index(spans, np.array(sums, dtype=np.uint32))


def save(tar: Path, index: Index, sha256: str) -> None:
    """Write the index of `tar` atomically; do nothing if the folder cannot be written."""
    path = tar.with_suffix(".idx")
    try:
        length, count = tar.stat().st_size, len(index.spans)
        head = _HEAD.pack(_MAGIC, bytes.fromhex(sha256), length, count)
        body = index.spans.astype("<i8").tobytes() + index.checksums.astype("<u4").tobytes()
        with atomic_file(path) as file:
            file.write(head + body)
    except OSError:
        pass  # it is only a cache


def load(tar: Path, sha256: str) -> Index | None:
    """Return the stored index, or None if it is missing, damaged or of another tar."""
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
    """Return the sha256 of an open file, in hex."""
    digest, place = hashlib.sha256(), 0
    while piece := os.pread(descriptor, _PIECE, place):
        digest.update(piece)
        place += len(piece)
    return digest.hexdigest()


def scan(descriptor: int, name: str) -> NDArray[np.int64]:
    """Return `Index.spans` from the headers of the open tar."""
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
    """Return the size of the member with this header; raise DataError if it is not a tar header."""
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
