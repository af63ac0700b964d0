"""Read a record of a shard by its number: one pread at the offset in the index."""

from __future__ import annotations

import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards.index import index_of, scan
from lbr_ds.shards.manifest import Manifest, ShardFile, check_size
from lbr_ds.system.urls import CACHE_GIB

_TOGETHER = 64  # records that `read_records` reads and decodes at once
_OPEN_FILES = 256  # below the usual limit of 1024 per process
_INDEX_BYTES = 128 << 20  # of the indexes in memory: those of about 1,600 shards of 4,096 records
_AT_ONCE = 8  # shards of a URL that a process fetches at the same time
_OPEN_TRIES = 5  # of a shard that other processes keep removing from the cache


class _Shard(NamedTuple):
    """The index of a shard that was opened once: 20 bytes per record."""

    spans: array[int]  # offset, size, offset, size, ...
    checksums: array[int] | None  # None: the tar was checked when it was fetched

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return 20 * (len(self.spans) // 2)


class Tars:
    """Random access to the records of a split. Picklable; opens files on demand.

    Holds 20 bytes per record of the shards that were opened last, 128 MiB at most, and at most 256
    open files.

    Args:
        manifest: Of the prepared folder.
        split: The split to read.
        partial: Whether a shard of another length than the manifest's is read as far as possible.
    """

    def __init__(self, manifest: Manifest, split: str, *, partial: bool = False) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()  # first, because __del__ needs it
        self.manifest = manifest
        self.shards = manifest.shards(split)
        self.partial = partial
        self._known: OrderedDict[int, _Shard] = OrderedDict()  # the one opened last is at the end
        self._held = 0  # bytes of _known
        self._lost: dict[int, str] = {}  # partial: shards that cannot be read at all, and why

    def __getstate__(self) -> dict[str, Any]:
        # Open files belong to one process.
        return {
            **self.__dict__,
            "_known": OrderedDict(),
            "_held": 0,
            "_lost": {},
            "_files": OrderedDict(),
        }

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, shard: int, record: int) -> bytes:
        """Return the bytes of a record.

        Raises:
            DataError: The tar or the record is missing, truncated, altered or unreadable.
        """
        descriptor = self._files.get(shard)
        if descriptor is None:
            descriptor = self._open(shard)
        else:
            self._files.move_to_end(shard)
        spans, checksums = self._known[shard]
        offset, size = spans[2 * record], spans[2 * record + 1]
        try:
            # Not mmap: truncating the tar meanwhile would kill the process (SIGBUS).
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{self.where(shard, record)}: {error.strerror}") from None
        if len(data) != size:
            raise DataError(f"{self.where(shard, record)}: the tar ends inside this record")
        if checksums is not None and crc32(data) != checksums[record]:
            raise DataError(f"{self.where(shard, record)}: altered since it was written (CRC-32)")
        return data

    def where(self, shard: int, record: int) -> str:
        """Return the place of a record for messages."""
        name = self.manifest.where(self.shards[shard])
        known = self._known.get(shard)
        return f"{name}: record {record}" + (f" at byte {known.spans[2 * record]}" if known else "")

    def fetch(self, shards: Iterable[int]) -> None:
        """Fetch the shards of a URL that are not open into the cache, several at the same time.

        Nothing is fetched where they would fill more than half of the cache and displace each
        other.

        Raises:
            DataError: A shard is missing or altered, and `partial` is False.
            EnvironmentProblem: The URL cannot be reached.
        """
        remote = self.manifest.remote
        if remote is None:
            return
        absent = [s for s in dict.fromkeys(shards) if s not in self._files and s not in self._lost]
        size = sum(self.shards[shard].bytes for shard in absent)
        if len(absent) < 2 or size > remote.cache_gib * 2**30 / 2:
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            fetched = [pool.submit(self.manifest.file, self.shards[shard]) for shard in absent]
            for shard, done in zip(absent, fetched, strict=True):
                try:
                    done.result()
                except DataError as error:
                    if not self.partial:
                        pool.shutdown(cancel_futures=True)
                        raise
                    self._lost[shard] = str(error)

    def _open(self, shard: int) -> int:
        """Open a shard, compare it with the manifest, and read its index if it is not known."""
        if shard in self._lost:
            raise DataError(self._lost[shard])
        try:
            descriptor = self._opened(shard)
        except DataError as error:
            if self.partial:
                self._lost[shard] = str(error)
            raise
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _opened(self, shard: int) -> int:
        stated = self.shards[shard]
        descriptor, path = self._descriptor(stated)
        try:
            if not self.partial:
                name = self.manifest.where(stated)
                check_size(name, stated, os.fstat(descriptor).st_size)
            if shard in self._known:
                self._known.move_to_end(shard)
            else:
                self._keep(shard, self._checked_index(path, descriptor, stated))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _keep(self, shard: int, index: _Shard) -> None:
        """Keep an index, and forget those that were opened longest ago, with their files."""
        self._known[shard] = index
        self._held += index.size
        while self._held > _INDEX_BYTES and len(self._known) > 1:
            oldest, forgotten = self._known.popitem(last=False)
            self._held -= forgotten.size
            if oldest in self._files:
                os.close(self._files.pop(oldest))

    def _descriptor(self, stated: ShardFile) -> tuple[int, Path]:
        """Return the open tar; another process may remove a cached one before it is opened."""
        name = self.manifest.where(stated)
        for _ in range(_OPEN_TRIES):
            path = self.manifest.file(stated)
            try:
                return os.open(path, os.O_RDONLY), path
            except FileNotFoundError as error:
                reason = error.strerror
                if self.manifest.remote is None:
                    break
            except OSError as error:
                raise DataError(f"{name}: cannot open this shard ({error.strerror})") from None
        raise DataError(f"{name}: cannot open this shard ({reason})")

    def _checked_index(self, path: Path, descriptor: int, stated: ShardFile) -> _Shard:
        name = self.manifest.where(stated)
        if self.manifest.remote is not None:
            # An index in the cache would be another file to count there.
            spans, checksums = scan(descriptor, name), None
        else:
            spans, sums = index_of(path, descriptor, name, stated.sha256)
            checksums = array("I", sums.astype("=u4").tobytes())
        if len(spans) != stated.records:
            raise DataError(
                f"{name}: contains {len(spans)} records, but the manifest lists {stated.records}; "
                "run `lbr-ds prepare` again"
            )
        return _Shard(array("q", spans.tobytes()), checksums)


def decode_valid(data: Sequence[bytes]) -> list[Record] | None:
    """Return the records of many JSON texts, or None if any is invalid; `decode` names the error.

    One call of the parser for all takes a third of the time of separate calls.
    """
    try:
        raws = json.loads(str(b"[" + b",".join(data) + b"]", "utf-8"))
    except (ValueError, RecursionError):
        return None
    records = [record for raw in raws if (record := Record.from_valid(raw)) is not None]
    return records if len(records) == len(raws) == len(data) else None


def decode(data: bytes, where: str) -> Record:
    """Return the record of JSON bytes. Raises DataError that begins with `where`."""
    try:
        raw = json.loads(str(data, "utf-8"))  # json would guess the encoding of bytes
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    return Record.from_dict(raw, where)


def read_split(folder: Path | str, split: str, *, cache_gib: float = CACHE_GIB) -> Iterator[Record]:
    """Yield all records of `split` in file order; `folder` may be a URL. May raise DataError."""
    return read_records(Manifest.load(folder, cache_gib), split)


def read_records(manifest: Manifest, split: str) -> Iterator[Record]:
    """Yield all records of `split` in file order. May raise DataError."""
    tars = Tars(manifest, split)
    for number, shard in enumerate(tars.shards):
        for first in range(0, shard.records, _TOGETHER):
            rows = range(first, min(first + _TOGETHER, shard.records))
            data = [tars.read(number, row) for row in rows]
            records = decode_valid(data)
            if records is None:
                for row, one in zip(rows, data, strict=True):
                    yield decode(one, tars.where(number, row))
            else:
                yield from records
