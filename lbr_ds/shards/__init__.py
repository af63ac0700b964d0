"""Write records as tar shards, and read samples from any step. Only door for webdataset.

    files = write_split(folder, "gl", records, seed=0, records_per_shard=4096)
    for record in read_split(folder, "gl"): ...
    for step in steps(folder, "gl", seed=0, samples_per_step=64, rank=0, world=8): ...

A prepared folder contains `SPLIT/00000.tar` (plain WebDataset: one `KEY.json` per record), an
offset index `SPLIT/00000.idx` beside each, and one `manifest.json`. Importing it imports neither
torch nor numpy: what reads or writes records is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lbr_ds.shards.manifest import Manifest, ShardFile, verify

if TYPE_CHECKING:
    from lbr_ds.shards.reader import read_records, read_split
    from lbr_ds.shards.stream import Sample, Step, steps
    from lbr_ds.shards.writer import write_split

__all__ = [
    "Manifest",
    "Sample",
    "ShardFile",
    "Step",
    "read_records",
    "read_split",
    "steps",
    "verify",
    "write_split",
]
_MODULES = {"read_records": "reader", "read_split": "reader", "write_split": "writer"}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'stream')}"), name)
