"""A shard's record by number: one pread at the offset that the index gives."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards.index import index_of
from lbr_ds.shards.manifest import Manifest, ShardFile, check_size

_OPEN_FILES = 256  # below the usual limit of 1024 a process; a closed shard costs one open


class Tars:
    """Random access to the records of some shards. Picklable; opens files as they are needed.

    Keeps 16 bytes of index a record of the shards it has touched, and at most 256 open files.
    """

    def __init__(self, folder: Path, shards: Sequence[ShardFile]) -> None:
        self.shards = list(shards)
        self._paths = [folder / shard.file for shard in shards]
        self._names = [str(path) for path in self._paths]  # Path to str a record would cost 2 us
        self._spans: dict[int, NDArray[np.int64]] = {}
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Open files belong to one process.
        return {**self.__dict__, "_spans": {}, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, shard: int, record: int) -> bytes:
        """The raw bytes of a record. Raises DataError for a missing, cut or unreadable tar."""
        descriptor = self._files.get(shard)
        if descriptor is None:
            descriptor = self._open(shard)
        else:
            self._files.move_to_end(shard)
        offset, size = self._spans[shard][record].tolist()
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{self.where(shard, record)}: {error.strerror}") from None
        if len(data) != size:
            raise DataError(f"{self.where(shard, record)}: the tar ends inside this record")
        return data

    def where(self, shard: int, record: int) -> str:
        """The place of a record, for messages."""
        return f"{self._names[shard]}: record {record} at byte {self._spans[shard][record, 0]}"

    def _open(self, shard: int) -> int:
        """Open a shard, compare it with the manifest, and read its index once."""
        stated, path = self.shards[shard], self._paths[shard]
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot open this shard ({error.strerror})") from None
        try:
            check_size(path, stated, os.fstat(descriptor).st_size)
            if shard not in self._spans:
                self._spans[shard] = _checked_index(path, stated)
        except BaseException:
            os.close(descriptor)
            raise
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


def _checked_index(path: Path, stated: ShardFile) -> NDArray[np.int64]:
    spans = index_of(path)
    if len(spans) != stated.records:
        raise DataError(
            f"{path}: holds {len(spans)} records and not the manifest's {stated.records}; "
            "run `lbr-ds prepare` again"
        )
    return spans


def decode(data: bytes, where: str) -> Record:
    """JSON bytes -> record. Raises DataError that begins with `where`."""
    try:
        raw = json.loads(str(data, "utf-8"))  # json would guess the encoding of bytes
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    return Record.from_dict(raw, where)


def read_split(folder: Path, split: str) -> Iterator[Record]:
    """All records of `split` in file order. Raises DataError at the first fault."""
    tars = Tars(folder, Manifest.load(folder).shards(split))
    for number, shard in enumerate(tars.shards):
        for record in range(shard.records):
            data = tars.read(number, record)
            yield decode(data, tars.where(number, record))
