"""Write records as plain WebDataset tars. The same records and seed give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.records import Record
from lbr_ds.shards import index
from lbr_ds.shards.manifest import ShardFile
from lbr_ds.shards.order import WRITE, permutation
from lbr_ds.system.locate import file_sha256
from lbr_ds.system.progress import Progress, no_progress


def write_split(
    folder: Path,
    split: str,
    records: Sequence[Record],
    *,
    seed: int,
    records_per_shard: int,
    sources: Sequence[str] = (),
    progress: Progress = no_progress,
) -> list[ShardFile]:
    """Shuffle `records` by seed and write `folder/split/00000.tar` ..., each with its index.

    The key of a record is its number in the split. The folder of the split must not exist yet.

    Args:
        folder: The prepared folder.
        split: The name of the split.
        records: Its records.
        seed: Decides their order.
        records_per_shard: Records of a tar; the last one of a source may have fewer.
        sources: The source of each record: every shard then has records of one source, and the
            sources follow one another by name. Empty: records of all sources are mixed.
        progress: Called with the records written.

    Returns:
        The manifest's entry for each tar.
    """
    (folder / split).mkdir(parents=True)
    order = permutation(len(records), seed, WRITE)
    if sources:
        order = np.array(sorted(order.tolist(), key=sources.__getitem__), dtype=np.int64)
    shards = []
    for number, (first, last) in enumerate(_spans(order, sources, records_per_shard)):
        tar = folder / split / f"{number:05d}.tar"
        _write_tar(tar, first, [records[i] for i in order[first:last]])
        with tar.open("rb") as file:
            made = index.make(file.fileno(), str(tar))
        assert len(made.spans) == last - first
        sha256 = file_sha256(tar)
        index.save(tar, made, sha256)
        size = tar.stat().st_size
        source = sources[order[first]] if sources else ""
        shards.append(ShardFile(f"{split}/{tar.name}", last - first, size, sha256, source))
        progress(f"write {split}", last, len(records))
    return shards


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


def _write_tar(tar: Path, first: int, records: list[Record]) -> None:
    # webdataset imports torch, which reading a manifest does not need.
    from webdataset import TarWriter

    # An open file, not a name: TarWriter passes names to gopen, which executes `pipe:` ones.
    with tar.open("wb") as file:
        writer = TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
        try:
            for key, record in enumerate(records, first):
                writer.write({"__key__": f"{key:09d}", "json": record.to_json().encode()})
            writer.close()
        except OSError:
            # A full disk: otherwise tarfile would write again when it is garbage-collected.
            writer.tarstream.fileobj.closed = True
            raise
