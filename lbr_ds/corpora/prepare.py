"""raw -> records -> splits -> shards: everything that `lbr-ds prepare` does.

1. Find the sources' files and hash them; a folder made of the same is reused.
2. Read, clean, sign and drop exact duplicates into a store on disk (`collect.py`, `cleaning.py`).
3. Find near duplicates (`near.py`), unite what belongs together (`unite.py`), divide it into gl, cl
   and eval (`splits.py`; under protocol knowledge `knowledge.py`, with a control split), part
   negatives from the other side (`leaks.py`).
4. Write the shards beside the folder, prove from them that eval leaks nowhere (`leaks.py`).
5. Write manifest.json and curation.json, and rename the whole into place.

Each step is kept with its result; an interrupted run goes on after the last. Memory is bounded but
for about 50 bytes a distinct text (`near.py`); the work folder takes about three times the text and
600 bytes a distinct one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import lbr_ds
from lbr_ds.config import CONTROL, SPLITS, DataConfig, ModelConfig
from lbr_ds.corpora import audit, sources
from lbr_ds.corpora.collect import Collected, collect
from lbr_ds.corpora.curate import knowledge, language, leaks, trained_texts
from lbr_ds.corpora.curate.groups import drop_near_duplicates, find_families, group_records
from lbr_ds.corpora.curate.splits import divide
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.token_counts import Room, room, tokenizer_json
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.instructions import SIDES, Instructed
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, ShardFile, write_split
from lbr_ds.shards.manifest import NAME
from lbr_ds.system.atomic import (
    atomic_folder,
    check_replaceable,
    is_unfinished,
    recover,
    try_recover,
)
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import Progress, no_progress

log = logging.getLogger(__name__)
CURATION = "curation.json"
MINING, GIVEN = "mining.json", "given"  # what `mine` adds: its audit, and cl as prepare wrote it
_RULES = 6  # raise it when cleaning or dividing changes, so that old folders are made again


def prepare(
    data: DataConfig,
    seed: int,
    progress: Progress = no_progress,
    model: ModelConfig | None = None,
    bottleneck: int = 0,
) -> dict[str, Any]:
    """Make `data.folder` from `data.sources`, or reuse it when it was made from the same.

    model: the backbone whose tokenizer counts for `data.min_tokens` and `data.max_tokens`, and for
    instructions where it is at hand. bottleneck: the tokens that are added to each text.

    Returns what curation.json holds, and `reused`. The same files, settings and seed give the same
    bytes. Raises ConfigError when the folder holds anything but prepared data, DataError for bad
    input or splits that cannot be filled, EnvironmentProblem when the disk is full. Whatever is
    raised, an earlier folder stays as it was.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one corpus")
    for source in data.sources:
        sources.check(source)
    language.check(data.languages)
    folder = check_replaceable(data.local_folder)
    refuse_foreign(folder)
    corpora = [sources.find(source) for source in data.sources]
    table = [corpus.provenance() for corpus in corpora]
    tokenizer = _tokenizer(data, model)
    fingerprint = _fingerprint(data, seed, table, tokenizer)
    recover(folder, keep=fingerprint)
    kept = _reusable(folder, fingerprint)
    if kept is not None:
        try_recover(folder)
        log.info("%s is up to date, reused", folder)
        return {**kept, "reused": True}
    with (
        writing(folder),
        atomic_folder(folder, key=fingerprint, check=refuse_foreign) as new,
        closing(Store(new.parent)) as store,
    ):
        manifest = Manifest(new, {}, table, seed, fingerprint, lbr_ds.__version__)
        counter = new.parent / "tokenizer.json" if tokenizer else None
        if counter:
            counter.write_text(tokenizer, encoding="utf-8")
        space = room(model, bottleneck, str(counter or ""))
        if space:
            space.check(_stated_instructions(corpora))
        collected = collect(data, corpora, str(counter or ""), store, progress)
        made = _make(data, collected, store, manifest, space, progress)
    return {**made, "reused": False}


def _make(
    data: DataConfig,
    collected: Collected,
    store: Store,
    manifest: Manifest,
    space: Room | None,
    progress: Progress,
) -> dict[str, Any]:
    """Divide and write what was read into `manifest.folder`; returns the curation."""
    dropped, removed = collected.records, collected.texts
    known = data.protocol == "knowledge"
    split = knowledge.divide_entities if known else divide
    stages: dict[str, Callable[[], None]] = {
        "families": lambda: find_families(store, data.near_duplicate, progress),
        "near duplicates": lambda: drop_near_duplicates(store, dropped),
        **(
            {"facts": lambda: knowledge.choose_facts(store, manifest.seed, dropped)}
            if known
            else {}
        ),
        "groups": lambda: group_records(store, manifest.seed),
        "divide": lambda: split(store, data.splits, dropped),
        "negatives": lambda: leaks.remove_leaking_negatives(store, removed),
    }
    for name, work in stages.items():
        if not store.recall(name):
            with store.step():
                work()
                store.remember("collected", collected.to_dict())
                store.remember(name, True)
    used = audit.instructions(store, data.split_names)
    if space:
        space.check(used.stated())
    manifest = replace(manifest, instructions=used)
    stored = {name: Stored(store, name) for name in data.split_names}
    for name in stored:
        manifest.splits[name] = _write(stored[name], name, store, manifest, data, progress)
    manifest.save()
    made = _curation(data, stored, store, manifest, collected)
    made["leaks"] = leaks.prove_no_leaks(manifest.folder, store, progress)
    if known:
        made |= {
            "protocol": data.protocol,
            "entities": knowledge.entities_table(store),
            "eval_texts_in_gl": knowledge.eval_texts_in_gl(store),
        }
    trained_texts.write(manifest.folder)
    text = json.dumps(made, indent=1, ensure_ascii=False)
    (manifest.folder / CURATION).write_text(text + "\n", encoding="utf-8")
    return made


class Stored(Sequence[Record]):
    """The records of a split, each read from the store when it is asked for."""

    def __init__(self, store: Store, split: str) -> None:
        self._store = store
        ordered = store.db.execute(
            "SELECT seq FROM placed JOIN components USING (component) JOIN records USING (seq)"
            " WHERE split = ? ORDER BY draw, id",
            (split,),
        )
        self.seqs = array("q", (seq for (seq,) in ordered))

    def __len__(self) -> int:
        return len(self.seqs)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self._store.record(seq) for seq in self.seqs[place]]
        return self._store.record(self.seqs[place])


def _write(
    records: Stored,
    split: str,
    store: Store,
    manifest: Manifest,
    data: DataConfig,
    progress: Progress,
) -> list[ShardFile]:
    """Write one split, unless an earlier run did."""
    kept = store.recall(f"write {split}")
    if kept:
        return [ShardFile(**shard) for shard in kept]
    shutil.rmtree(manifest.folder / split, ignore_errors=True)
    shards = write_split(
        manifest.folder,
        split,
        records,
        seed=manifest.seed,
        records_per_shard=data.records_per_shard,
        progress=progress,
    )
    with store.step():
        store.remember(f"write {split}", [vars(shard) for shard in shards])
    return shards


def _curation(
    data: DataConfig,
    stored: dict[str, Stored],
    store: Store,
    manifest: Manifest,
    collected: Collected,
) -> dict[str, Any]:
    return {
        "fingerprint": manifest.fingerprint,
        "seed": manifest.seed,
        "languages": list(data.languages),
        "sources": audit.sources_table(manifest.sources, collected),
        **({"instructions": used.plain()} if (used := manifest.instructions).any else {}),
        **audit.dropped_table(collected.records, collected.texts),
        "components": audit.components_table(store),
        "groups": audit.groups_table(store, data.near_duplicate),
        "splits": {
            name: audit.split_table(store, name, iter(records.seqs), data.splits)
            for name, records in stored.items()
        },
    }


def _stated_instructions(corpora: list[sources.Corpus]) -> Iterator[Instructed]:
    """Those of each side of each source, as the recipe gives them."""
    for corpus in corpora:
        for side in SIDES:
            where = f"data.sources {corpus.name}, instruction.{side}"
            yield Instructed(getattr(corpus.source.instruction, side), "", where)


def _tokenizer(data: DataConfig, model: ModelConfig | None) -> str:
    """The JSON of the tokenizer that counts; empty where nothing has to be counted."""
    if not data.counts_tokens:
        return ""
    if model is None:
        raise ConfigError("data.min_tokens and data.max_tokens need model.backbone to count with")
    return tokenizer_json(model)


def _fingerprint(data: DataConfig, seed: int, table: list[dict[str, Any]], tokenizer: str) -> str:
    """Hash of all that decides the shards' bytes, the recipe's words on provenance included."""
    plain = [_RULES, lbr_ds.__version__, seed, _settings(data), table, tokenizer]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _settings(data: DataConfig) -> dict[str, Any]:
    """What of the recipe decides the bytes."""
    settings: dict[str, Any] = json.loads(data.model_dump_json(exclude={"folder", "workers"}))
    if data.protocol == "random":  # folders from before there was another stay what they are
        del settings["protocol"], settings["splits"]["control"]
        for source in settings["sources"]:
            del source["role"]
    return settings


def refuse_foreign(folder: Path) -> None:
    """Raise ConfigError when `folder` holds anything that prepare or mine did not write."""
    if not folder.exists():
        return
    cure = "name another data.folder, or move that away"
    if not folder.is_dir():
        raise ConfigError(f"data.folder={folder} is a file; {cure}")
    entries = sorted(folder.iterdir())
    if entries and not (folder / NAME).is_file():
        raise ConfigError(f"data.folder={folder} holds {entries[0].name!r} and no {NAME}; {cure}")
    for path in entries:
        ours = path.name in (NAME, CURATION, trained_texts.NAME, MINING) or is_unfinished(path.name)
        if path.name in (*SPLITS, CONTROL, GIVEN) and path.is_dir():
            ours = all(
                below.suffix in (".tar", ".idx") or is_unfinished(below.name)
                for below in path.iterdir()
            )
        if not ours:
            raise ConfigError(
                f"data.folder={folder}: lbr-ds did not write all of {path.name!r}; {cure}"
            )


def _reusable(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The curation of a whole folder that was made from the same, else None."""
    if not (folder / NAME).is_file():
        return None
    try:
        manifest = Manifest.load(folder)
        if manifest.prepared != fingerprint:
            log.info("%s was made from other sources or settings; made again", folder)
            return None
        for name in manifest.splits:
            manifest.check(name)
        found: dict[str, Any] = json.loads((folder / CURATION).read_bytes())
        if manifest.beside(trained_texts.NAME) is None:  # made by an older version
            trained_texts.write(folder)
        return found
    except (DataError, OSError, ValueError) as error:
        log.warning("%s; made again", error)
        return None
