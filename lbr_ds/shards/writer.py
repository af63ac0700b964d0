"""Write records as plain WebDataset tars. The same records and seed give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    progress: Progress = no_progress,
) -> list[ShardFile]:
    """Shuffle `records` by seed and write `folder/split/00000.tar` ..., each with its index.

    The key of a record is its number in the split. The folder of the split must not exist yet.

    Returns:
        The manifest's entry for each tar.
    """
    (folder / split).mkdir(parents=True)
    order = permutation(len(records), seed, WRITE)
    shards = []
    for number, first in enumerate(range(0, len(records), records_per_shard)):
        tar = folder / split / f"{number:05d}.tar"
        last = min(first + records_per_shard, len(records))
        _write_tar(tar, first, [records[i] for i in order[first:last]])
        with tar.open("rb") as file:
            made = index.make(file.fileno(), str(tar))
        assert len(made.spans) == last - first
        sha256 = file_sha256(tar)
        index.save(tar, made, sha256)
        size = tar.stat().st_size
        shards.append(ShardFile(f"{split}/{tar.name}", last - first, size, sha256))
        progress(f"write {split}", last, len(records))
    return shards


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
