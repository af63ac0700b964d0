"""Which sources the records of a split have, and how many records each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from lbr_ds.shards.manifest import Manifest, ShardFile

OTHERS = "others"  # where records are counted together: of a source that is not listed
MAX_TRACKED = 16  # sources with metrics of their own


def shard_sources(shards: Iterable[ShardFile]) -> dict[str, int]:
    """Return the records of each source by name; {} where shards have records of several."""
    sizes: dict[str, int] = {}
    for shard in shards:
        sizes[shard.source] = sizes.get(shard.source, 0) + shard.records
    return {} if "" in sizes else dict(sorted(sizes.items()))


def split_sources(manifest: Manifest, split: str) -> dict[str, int]:
    """Return the records of each source of a split, by name.

    From the manifest where shards are of one source each, else as `prepare` has counted them; {}
    for a folder without curation.json.
    """
    if sizes := shard_sources(manifest.shards(split)):
        return sizes
    audit = manifest.beside("curation.json")
    try:
        counted = json.loads(audit)["splits"][split]["by_source"] if audit else {}
        return {str(name): int(count) for name, count in sorted(counted.items())}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # the manifest decides what the data is; that file only explains it


def tracked_sources(manifest: Manifest, split: str) -> tuple[str, ...]:
    """Return the sources of a split that get metrics of their own; see `largest`."""
    return largest(split_sources(manifest, split))


def largest(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names of sources that are shown one by one; () where there is only one.

    Of more than MAX_TRACKED the largest, and OTHERS for the rest.
    """
    if len(sizes) < 2:
        return ()
    if len(sizes) <= MAX_TRACKED:
        return tuple(sorted(sizes))
    kept = sorted(sizes, key=lambda name: (-sizes[name], name))[: MAX_TRACKED - 1]
    return (*sorted(set(kept) - {OTHERS}), OTHERS)
