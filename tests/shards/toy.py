"""Records and a prepared folder, made on the fly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from lbr_ds.records import Record
from lbr_ds.shards import Manifest, Step, steps, write_split


def make_records(count: int) -> list[Record]:
    """Pairs and a few passages, one with text beyond ASCII."""
    pairs = [
        Record(id=f"r{i}", source="toy", query=f"what is {i}?", positives=[f"number {i} \u00e9"])
        for i in range(count - count // 10)
    ]
    return pairs + [Record(id=f"t{i}", source="toy", text=f"t {i}") for i in range(count // 10)]


def make_folder(folder: Path, count: int, per_shard: int) -> Path:
    """A prepared folder with one split, gl."""
    shards = write_split(folder, "gl", make_records(count), seed=5, records_per_shard=per_shard)
    Manifest(folder, {"gl": shards}, [], 5, "print", "test").save()
    return folder


class Loaded(IterableDataset[Step]):
    """What a training loop makes of `steps`: one pipeline a worker process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[Step]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return iter(
            steps(
                self.folder,
                "gl",
                seed=3,
                samples_per_step=6,
                rank=1,
                world=2,
                start=5,
                stop=41,
                worker=worker,
                workers=workers,
            )
        )
