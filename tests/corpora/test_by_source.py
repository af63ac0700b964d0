"""Shards of one source each: the same records in the same splits, and prepared only when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import SPLITS, DataConfig
from lbr_ds.corpora.prepare import prepare
from lbr_ds.shards import Manifest
from lbr_ds.shards.sources import OTHERS, split_sources, tracked_sources
from tests.corpora.toy import pair, read_all, write_raw


def recipe(folder: Path, name: str = "data", **first: Any) -> DataConfig:
    """Two sources; every tenth record of the second names a source of its own."""
    one = write_raw(folder / "one.jsonl", map(pair, range(60)))
    rows = [pair(i, **({"source": "own"} if i % 10 == 0 else {})) for i in range(100, 200)]
    two = write_raw(folder / "two.jsonl", rows)
    sources = [{"path": str(one), "name": "one", **first}, {"path": str(two), "name": "two"}]
    return DataConfig.model_validate(
        {"folder": folder / name, "records_per_shard": 16, "sources": sources}
    )


def test_the_same_records_and_each_shard_of_one_source(tmp_path: Path) -> None:
    plain, weighed = recipe(tmp_path, "plain"), recipe(tmp_path, "weighed", weight=2)
    prepare(plain, 0)
    made = prepare(weighed, 0)
    mixed, apart = read_all(plain.folder), read_all(weighed.folder)
    manifest = Manifest.load(weighed.folder)
    for split in SPLITS:
        assert {r.id: r for r in mixed[split]} == {r.id: r for r in apart[split]}
        records = iter(apart[split])
        for shard in manifest.shards(split):
            found = {next(records).source for _ in range(shard.records)}
            assert found == {"own" if shard.source == OTHERS else shard.source}
        sizes = split_sources(manifest, split)
        assert sizes == {
            OTHERS if name == "own" else name: n
            for name, n in made["splits"][split]["by_source"].items()
        }
        assert tracked_sources(manifest, split) == tuple(sorted(sizes))
        before = Manifest.load(plain.folder)
        assert {shard.source for shard in before.shards(split)} == {""}
        assert split_sources(before, split) == made["splits"][split]["by_source"]


def test_many_sources_are_tracked_as_the_largest_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe(tmp_path), 0)
    manifest = Manifest.load(tmp_path / "data")
    sizes = split_sources(manifest, "gl")
    assert sorted(sizes, key=lambda name: sizes[name]) == ["own", "one", "two"]
    monkeypatch.setattr("lbr_ds.shards.sources.MAX_TRACKED", 2)
    assert tracked_sources(manifest, "gl") == ("two", OTHERS)


def test_what_training_alone_reads_prepares_nothing_anew(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, weight=2), 0)
    for same in ({"weight": 3}, {"weight": 1, "temperature": 0.1}):
        assert prepare(recipe(tmp_path, **same), 0)["reused"]
    assert not prepare(recipe(tmp_path), 0)["reused"]
    assert prepare(recipe(tmp_path, temperature=0.1), 0)["reused"]
    assert not prepare(recipe(tmp_path), 0, by_source=True)["reused"]
