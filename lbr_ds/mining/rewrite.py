"""Replace the records of cl in a prepared folder; everything else is unchanged.

`mine` adds negatives to the records of cl, and then the scores of a teacher; `synthesize` replaces
passages of cl by pairs.

1. Beside the folder: every file linked (copied where the disk cannot link), cl as it was becomes
   `given/` (or `passages/`, `unscored/`), and the new cl is written.
2. Every shard is read again and compared with its hash; no text of eval may be in training splits.
3. One rename puts the new folder in place; until then the old one is unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

import lbr_ds
from lbr_ds.corpora.curate import leaks, trained_texts
from lbr_ds.corpora.prepare import GIVEN, MINING, PASSAGES, SYNTHESIS, TEACHING, UNSCORED
from lbr_ds.distributed import World
from lbr_ds.instructions import Instructions
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, teacher, verify, write_split
from lbr_ds.shards.manifest import NAME, ShardFile
from lbr_ds.shards.order import WRITE, permutation
from lbr_ds.shards.writer import Lazy
from lbr_ds.system.atomic import atomic_folder, recover
from lbr_ds.system.failures import writing
from lbr_ds.system.locate import file_sha256
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.progress import Progress, no_progress

T = TypeVar("T")


@dataclass(frozen=True)
class Verb:
    """A verb that remakes cl.

    Attributes:
        format: Of its entry among the manifest's sources.
        title: The name of that entry.
        kept: The split that keeps cl as it was before.
        audit: The file that says what was done.
        undone: The verb whose result is lost with this one: negatives belong to their queries, and
            scores to their passages.
        files: Other files that it may write.
    """

    format: str
    title: str
    kept: str
    audit: str
    undone: Verb | None = None
    files: tuple[str, ...] = ()

    def chain(self) -> list[Verb]:
        """Return this verb and all whose results are lost with it."""
        return [self, *(self.undone.chain() if self.undone else ())]

    def source_split(self, manifest: Manifest) -> str:
        """Return the split with cl as it was before this verb."""
        if self.kept in manifest.splits:
            return self.kept
        return self.undone.source_split(manifest) if self.undone else "cl"


TEACH = Verb("teach", "teacher", UNSCORED, TEACHING, files=teacher.FILES)
MINE = Verb("mine", "mined negatives", GIVEN, MINING, TEACH)
SYNTHESIZE = Verb("synthesize", "synthetic queries", PASSAGES, SYNTHESIS, MINE)


def on_ranks(
    folder: Path,
    world: World,
    share: Callable[[Progress], None],
    write: Callable[[], T],
    progress: Progress,
) -> T | None:
    """Let every rank do its share, then the first one write the folder, which it locks meanwhile.

    Args:
        folder: The prepared folder.
        world: The ranks.
        share: A rank's share of the models' work; called if there are several ranks.
        write: What the first rank does after its share.
        progress: Shows the work of the first rank.

    Returns:
        What `write` returns; None on other ranks than the first.
    """
    if not world.first:
        share(no_progress)
        return None
    recover(folder)
    with lock_folder(folder, beside=True, cure="wait until it has ended"):
        if world.size > 1:
            share(progress)
        return write()


def source_split(manifest: Manifest) -> str:
    """Return the split with cl as it was before `mine`, without mined negatives."""
    return MINE.source_split(manifest)


def rewrite(
    manifest: Manifest,
    records: Sequence[Record],
    audit: dict[str, Any],
    records_per_shard: int,
    progress: Progress = no_progress,
    *,
    verb: Verb = MINE,
    check: Callable[[Path], object] = leaks.prove_no_equal_texts,
    instructions: Instructions | None = None,
    sources: Sequence[str] | None = None,
    write: Callable[[Path], object] | None = None,
) -> None:
    """Put `records` (in file order) into cl of `manifest.folder`, and `audit` into its file.

    check: Proves from the new folder that eval shares nothing with training.
    instructions: Of all records; None: as before.
    sources: Of each record, for shards of one source; None: the records have the shards of before.
    write: Writes the verb's `files` into the new folder; None: there are none.

    Raises DataError when what was written does not verify or shares a text with eval,
    EnvironmentProblem when the disk is full. The old folder is then unchanged.
    """
    folder = manifest.folder
    with writing(folder), atomic_folder(folder, check=Manifest.load) as new:
        given = _link_all(manifest, new, verb)
        owners = _owners(manifest, verb) if sources is None else sources
        shards = write_split(
            new,
            "cl",
            _before_shuffle(records, manifest.seed),
            seed=manifest.seed,
            records_per_shard=records_per_shard,
            sources=_before_shuffle(owners, manifest.seed) if any(owners) else (),
            progress=progress,
        )
        _write_audit(new / verb.audit, audit)
        splits = {**manifest.splits, "cl": shards, verb.kept: given}
        lost = verb.chain()[1:]
        for each in lost:
            splits.pop(each.kept, None)
        made = replace(
            manifest,
            folder=new,
            splits=splits,
            files=_files(manifest, verb),
            program=lbr_ds.__version__,
            instructions=manifest.instructions if instructions is None else instructions,
            sources=_with_entry(manifest.sources, new / verb.audit, verb),
            fingerprint=f"{audit['fingerprint']}-{fingerprint_before(manifest, verb)}",
        )
        if write:
            write(new)
            for name in verb.files:
                made = made.with_file(name)
        made.save()
        trained_texts.write(new)
        verify(new, progress)
        check(new)


def _files(manifest: Manifest, verb: Verb) -> dict[str, dict[str, Any]]:
    """Return the manifest's entries of files that this verb leaves."""
    gone = {name for each in verb.chain() for name in each.files}
    return {name: facts for name, facts in manifest.files.items() if name not in gone}


def fingerprint_before(manifest: Manifest, verb: Verb) -> str:
    """Return the fingerprint of the data without what this verb, and those it undoes, made."""
    parts = manifest.fingerprint.split("-")
    for each in verb.chain():
        if each.kept in manifest.splits:
            parts = parts[1:]
    return "-".join(parts)


def _link_all(manifest: Manifest, new: Path, verb: Verb) -> list[ShardFile]:
    """All files that stay, in `new`; returns the shards of cl as it was before."""
    old = manifest.folder
    remade = {"cl", NAME, trained_texts.NAME}
    for each in verb.chain():
        remade |= {each.kept, each.audit, *each.files}

    def apart(folder: str, names: list[str]) -> set[str]:
        return remade & set(names) if Path(folder) == old else set()

    shutil.copytree(old, new, copy_function=_link, ignore=apart, dirs_exist_ok=True)
    split = verb.source_split(manifest)
    shutil.copytree(old / split, new / verb.kept, copy_function=_link)
    return [
        replace(shard, file=f"{verb.kept}/{Path(shard.file).name}")
        for shard in manifest.shards(split)
    ]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # keeps the times, by which an index knows that it is fresh


def _owners(manifest: Manifest, verb: Verb) -> list[str]:
    """Return the source of each record of cl as its shard has it, in file order; "": mixed."""
    shards = manifest.shards(verb.source_split(manifest))
    return [shard.source for shard in shards for _ in range(shard.records)]


def _before_shuffle(items: Sequence[T], seed: int) -> Sequence[T]:
    """Return the order that `write_split` shuffles into the order of `items`."""
    order = permutation(len(items), seed, WRITE)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    if isinstance(items, Lazy):
        return cast("Sequence[T]", items.part(array("q", places.tobytes())))
    return [items[place] for place in places.tolist()]


def _write_audit(path: Path, audit: dict[str, Any]) -> None:
    text = json.dumps(audit, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _with_entry(sources: list[dict[str, Any]], audit: Path, verb: Verb) -> list[dict[str, Any]]:
    """Return the manifest's sources, the audit last: where negatives or queries come from."""
    remade = {each.format for each in verb.chain()}
    kept = [source for source in sources if source.get("format") not in remade]
    entry = {
        "name": verb.title,
        "path": verb.audit,
        "format": verb.format,
        "license": "",
        "bytes": audit.stat().st_size,
        "sha256": file_sha256(audit),
    }
    return [*kept, entry]
