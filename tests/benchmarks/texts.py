"""Texts and backbone of both sides of a row: real pairs, and a real small backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbr_ds.config import RunConfig, SourceConfig, load
from lbr_ds.corpora.sources import find
from lbr_ds.errors import DataError
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.records import Record
from lbr_ds.shards import read_split
from lbr_ds.system.locate import cache_folder
from tests.tiny import SHAPE

TINY = {**SHAPE, "model_type": "llama", "vocab_size": 128}  # a backbone for short versions
MAX_LENGTH = 512  # tokens; longer texts are cut on both sides alike


def pairs(data: Path | None, count: int) -> list[Record]:
    """Return `count` records with a query, evenly spread over `data` and with distinct texts.

    Args:
        data: a prepared folder (its split cl), a file or folder that a recipe could name as a
            source, or None: the demo's corpus.
        count: number of records.

    Raises:
        DataError: there are fewer.
    """
    distinct: dict[str, Record] = {}
    passages: set[str] = set()
    for record in _records(data):
        if record.query and record.query not in distinct and record.positives[0] not in passages:
            distinct[record.query] = record
            passages.add(record.positives[0])
    if len(distinct) < count:
        raise DataError(f"{data or 'demo'}: {len(distinct)} distinct pairs, {count} are needed")
    records = list(distinct.values())
    return [records[i * len(records) // count] for i in range(count)]


def real_passages(data: Path | None) -> list[str]:
    """Return the answers and plain passages of `data`, see `pairs`."""
    return [text for record in _records(data) for text in (*record.positives, record.text) if text]


def _records(data: Path | None) -> list[Record]:
    if data is not None and (data / "manifest.json").is_file():
        return list(read_split(data, "cl"))
    sources = [SourceConfig(path=str(data))] if data else load("demo").data.sources
    rows = (row for source in sources for _, row in find(source).read())
    return [row for row in rows if isinstance(row, Record)]


def backbone(num_layers: int = 6, max_length: int = MAX_LENGTH) -> RunConfig:
    """Return a run of the demo's backbone with `num_layers` layers that starts stage 2 from it.

    It is prepared once in the user's cache and reused by every later call.
    """
    folder = cache_folder() / "bench" / f"demo-{num_layers}-{max_length}"
    run = load(
        "demo",
        [
            f"run={folder}",
            f"model.num_layers={num_layers}",
            f"model.max_length={max_length}",
            "stage2.from=backbone",
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    return run


def with_stage2(run: RunConfig, **changes: Any) -> RunConfig:
    """Return the same run with other values in its section stage2."""
    return run.model_copy(update={"stage2": run.stage2.model_copy(update=changes)})
