"""A raw corpus on the fly and the recipe's part that names it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lbr_ds.config import SPLITS, DataConfig
from lbr_ds.records import Record
from lbr_ds.shards import read_split


def pair(number: int, **fields: Any) -> dict[str, Any]:
    """A raw record of its own group."""
    return {
        "id": f"r{number}",
        "query": f"question {number}",
        "positives": [f"answer {number}"],
        **fields,
    }


def write_raw(path: Path, raws: Iterable[dict[str, Any] | str]) -> Path:
    """JSON lines; a string is written as it is."""
    lines = (raw if isinstance(raw, str) else json.dumps(raw) for raw in raws)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def recipe(tmp_path: Path, raws: Iterable[dict[str, Any] | str], **fields: Any) -> DataConfig:
    """Write `raws` to raw.jsonl and make the DataConfig that prepares them into data/."""
    raw = write_raw(tmp_path / "raw.jsonl", raws)
    sources = [{"path": str(raw), "name": "toy", "license": "CC0"}]
    return DataConfig.model_validate({"folder": tmp_path / "data", "sources": sources, **fields})


def read_all(folder: Path) -> dict[str, list[Record]]:
    """The records of all three splits, from the shards."""
    return {name: list(read_split(folder, name)) for name in SPLITS}
