"""Replace the records of cl in a prepared folder; everything else keeps its bytes.

1. Beside the folder: every file linked (copied where the disk cannot link), cl as it was becomes
   `given/`, the new cl is written in the order of the old one.
2. Every shard is read again and compared with its hash; eval is proved apart from training.
3. One rename puts the new folder in place; until then the old one is unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import lbr_ds
from lbr_ds.corpora.curate import leaks, trained_texts
from lbr_ds.corpora.prepare import GIVEN, MINING
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, verify, write_split
from lbr_ds.shards.manifest import NAME, ShardFile
from lbr_ds.shards.order import WRITE, permutation
from lbr_ds.system.atomic import atomic_folder
from lbr_ds.system.failures import writing
from lbr_ds.system.locate import file_sha256
from lbr_ds.system.progress import Progress, no_progress

T = TypeVar("T")


def source_split(manifest: Manifest) -> str:
    """Return the split with cl as `prepare` wrote it, without mined negatives."""
    return GIVEN if GIVEN in manifest.splits else "cl"


def rewrite(
    manifest: Manifest,
    records: Sequence[Record],
    audit: dict[str, Any],
    records_per_shard: int,
    progress: Progress = no_progress,
) -> None:
    """Put `records` (in file order) into cl of `manifest.folder`, and `audit` into mining.json.

    Raises DataError when what was written does not verify or shares a text with eval,
    EnvironmentProblem when the disk is full. The old folder is then unchanged.
    """
    folder = manifest.folder
    with writing(folder), atomic_folder(folder, check=Manifest.load) as new:
        given = _link_all(manifest, new)
        owners = [
            s.source for s in manifest.shards(source_split(manifest)) for _ in range(s.records)
        ]
        shards = write_split(
            new,
            "cl",
            _before_shuffle(records, manifest.seed),
            seed=manifest.seed,
            records_per_shard=records_per_shard,
            sources=_before_shuffle(owners, manifest.seed) if any(owners) else (),
            progress=progress,
        )
        _write_audit(new, audit)
        splits = {**manifest.splits, "cl": shards, GIVEN: given}
        made = replace(
            manifest,
            folder=new,
            splits=splits,
            program=lbr_ds.__version__,
            sources=_with_mining(manifest.sources, new / MINING),
            fingerprint=f"{audit['fingerprint']}-{manifest.prepared}",
        )
        made.save()
        trained_texts.write(new)
        verify(new, progress)
        leaks.prove_no_equal_texts(new)


def _link_all(manifest: Manifest, new: Path) -> list[ShardFile]:
    """All files that stay, in `new`; returns the shards of `given/`."""
    old = manifest.folder
    remade = {"cl", GIVEN, NAME, MINING, trained_texts.NAME}

    def apart(folder: str, names: list[str]) -> set[str]:
        return remade & set(names) if Path(folder) == old else set()

    shutil.copytree(old, new, copy_function=_link, ignore=apart, dirs_exist_ok=True)
    split = source_split(manifest)
    shutil.copytree(old / split, new / GIVEN, copy_function=_link)
    return [
        replace(shard, file=f"{GIVEN}/{Path(shard.file).name}") for shard in manifest.shards(split)
    ]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # keeps the times, by which an index knows that it is fresh


def _before_shuffle(items: Sequence[T], seed: int) -> list[T]:
    """Return the order that `write_split` shuffles into the order of `items`."""
    order = permutation(len(items), seed, WRITE)
    given = list(items)
    for place, number in enumerate(order.tolist()):
        given[number] = items[place]
    return given


def _write_audit(folder: Path, audit: dict[str, Any]) -> None:
    text = json.dumps(audit, indent=1, ensure_ascii=False)
    (folder / MINING).write_text(text + "\n", encoding="utf-8")


def _with_mining(sources: list[dict[str, Any]], audit: Path) -> list[dict[str, Any]]:
    """Return the manifest's sources, the audit last: where the negatives come from."""
    kept = [source for source in sources if source.get("format") != "mine"]
    entry = {
        "name": "mined negatives",
        "path": MINING,
        "format": "mine",
        "license": "",
        "bytes": audit.stat().st_size,
        "sha256": file_sha256(audit),
    }
    return [*kept, entry]
