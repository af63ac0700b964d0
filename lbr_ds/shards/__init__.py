"""Write records as tar shards, and read samples from any step. Only door for webdataset.

    files = write_split(folder, "gl", records, seed=0, records_per_shard=4096)
    for record in read_split(folder, "gl"): ...
    for step in steps(folder, "gl", seed=0, samples_per_step=64, rank=0, world=8): ...

A prepared folder contains `SPLIT/00000.tar` (plain WebDataset: one `KEY.json` per record), an
offset index `SPLIT/00000.idx` beside each, and one `manifest.json`. Importing it does not import
torch.
"""

from __future__ import annotations

from lbr_ds.shards.manifest import Manifest, ShardFile, verify
from lbr_ds.shards.reader import read_split
from lbr_ds.shards.stream import Sample, Step, steps
from lbr_ds.shards.writer import write_split

__all__ = [
    "Manifest",
    "Sample",
    "ShardFile",
    "Step",
    "read_split",
    "steps",
    "verify",
    "write_split",
]
