"""Write records as plain WebDataset tars. The same records and seed give the same bytes.

All cores write, each a shard at a time; the bytes do not depend on their number. A shard is
complete when its index exists, so that an interrupted call can be resumed.
"""

from __future__ import annotations

import hashlib
import tarfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lbr_ds.records import Record
from lbr_ds.shards import index
from lbr_ds.shards.manifest import ShardFile
from lbr_ds.shards.order import WRITE, permutation
from lbr_ds.system.locate import file_sha256
from lbr_ds.system.process_pool import map_in_order
from lbr_ds.system.progress import Progress, no_progress

_RECORDS_ALONE = 1 << 15  # records written by this process before others are started


class Lazy(Sequence[Record]):
    """Records that the process which writes a shard reads itself; can be pickled."""

    @abstractmethod
    def part(self, places: Sequence[int]) -> Lazy:
        """Return those of the records that are at `places`."""


class _Job(NamedTuple):
    tar: Path
    first: int  # number of the first record
    records: Sequence[Record]
    source: str  # of all its records, if each shard has one


def write_split(
    folder: Path,
    split: str,
    records: Sequence[Record],
    *,
    seed: int,
    records_per_shard: int,
    sources: Sequence[str] = (),
    resume: bool = False,
    progress: Progress = no_progress,
) -> list[ShardFile]:
    """Shuffle `records` by seed and write `folder/split/00000.tar` ..., each with its index.

    The key of a record is its number in the split.

    Args:
        folder: The prepared folder.
        split: The name of the split.
        records: Its records.
        seed: Decides their order.
        records_per_shard: Records of a tar; the last one of a source may have fewer.
        sources: The source of each record: every shard then has records of one source, and the
            sources follow one another by name. Empty: records of all sources are mixed.
        resume: Whether the folder of the split may exist, from an interrupted call with the same
            arguments; its complete shards are kept.
        progress: Called with the records written.

    Returns:
        The manifest's entry for each tar.
    """
    (folder / split).mkdir(parents=True, exist_ok=resume)
    jobs = _jobs(folder / split, records, seed, records_per_shard, sources)
    shards, done = [], 0
    alone = 1 + _RECORDS_ALONE // records_per_shard
    for shard in map_in_order(_write, jobs, alone, phase=f"write {split}"):
        shards.append(shard)
        done += shard.records
        progress(f"write {split}", done, len(records))
    return shards


def _jobs(
    folder: Path, records: Sequence[Record], seed: int, per_shard: int, sources: Sequence[str]
) -> Iterator[_Job]:
    order = permutation(len(records), seed, WRITE)
    if sources:
        order = np.array(sorted(order.tolist(), key=sources.__getitem__), dtype=np.int64)
    for number, (first, last) in enumerate(_spans(order, sources, per_shard)):
        places = order[first:last].tolist()
        part: Sequence[Record]
        if isinstance(records, Lazy):
            part = records.part(places)
        else:
            part = [records[place] for place in places]
        source = sources[places[0]] if sources else ""
        yield _Job(folder / f"{number:05d}.tar", first, part, source)


def _spans(
    order: NDArray[np.int64], sources: Sequence[str], records_per_shard: int
) -> Iterator[tuple[int, int]]:
    """Yield the begin and end in `order` of each shard."""
    sizes = [len(list(own)) for _, own in groupby(order, sources.__getitem__)] if sources else []
    begin = 0
    for size in sizes or [len(order)]:
        for first in range(begin, begin + size, records_per_shard):
            yield first, min(first + records_per_shard, begin + size)
        begin += size


def _write(job: _Job) -> ShardFile:
    """Write a shard and its index, or return the entry of one that is there; in any process."""
    name = f"{job.tar.parent.name}/{job.tar.name}"
    if (sha256 := _complete(job.tar)) is None:
        made, sha256 = _write_tar(job.tar, job.first, job.records)
        index.save(job.tar, made, sha256)
    return ShardFile(name, len(job.records), job.tar.stat().st_size, sha256, job.source)


def _complete(tar: Path) -> str | None:
    """Return the sha256 of a tar that an interrupted call has completed, else None."""
    if not tar.with_suffix(".idx").exists():
        return None
    sha256 = file_sha256(tar)
    return sha256 if index.load(tar, sha256) is not None else None


def _write_tar(tar: Path, first: int, records: Iterable[Record]) -> tuple[index.Index, str]:
    """Write a tar of files NUMBER.json; return its index and its sha256."""
    spans, sums = [], []
    digest, place = hashlib.sha256(), 0
    with tar.open("wb") as file:
        for number, record in enumerate(records, first):
            data = record.to_json().encode()
            head = _header(f"{number:09d}.json", len(data))
            spans.append((place + len(head), len(data)))
            sums.append(crc32(data))
            whole = b"".join((head, data, bytes(-len(data) % tarfile.BLOCKSIZE)))
            digest.update(whole)
            file.write(whole)
            place += len(whole)
        end = bytes(2 * tarfile.BLOCKSIZE)
        end += bytes(-(place + len(end)) % tarfile.RECORDSIZE)
        digest.update(end)
        file.write(end)
    made = index.Index(np.array(spans, dtype=np.int64).reshape(-1, 2), np.array(sums, np.uint32))
    return made, digest.hexdigest()


def _header(name: str, size: int) -> bytes:
    """Return the header of a file in a tar, as tarfile makes it but in a tenth of its time."""
    blank = _BLANK
    whole = name.encode() + blank[len(name) : 124] + f"{size:011o}".encode() + blank[135:]
    total = sum(whole)
    return whole[:148] + f"{total:06o}".encode() + b"\0" + whole[155:]


def _blank_header() -> bytes:
    """Return the header of an empty file without a name, its checksum replaced by blanks."""
    made = tarfile.TarInfo("")
    made.uname = made.gname = ""
    head = made.tobuf(tarfile.USTAR_FORMAT)
    return head[:148] + b" " * 8 + head[156:]


_BLANK = _blank_header()
