"""Turn raw files into records, splits and shards: everything that `lbr-ds prepare` does.

1. Find the files of the sources and hash them; a folder made from the same files is reused.
2. Read and clean them into a store on disk, without exact duplicates (`collect.py`, `cleaning.py`,
   `exact_duplicates.py`).
3. Find near duplicates (`near_duplicates.py`), form components and groups (`groups.py`), divide
   them into gl, cl and eval (`splits.py`; for the knowledge protocol `knowledge.py`, with a control
   split), remove negatives that leak (`leaks.py`).
4. Write the shards beside the folder, and verify from them that eval leaks nowhere (`leaks.py`).
5. Write manifest.json and curation.json, and rename everything into place.

Each step is stored with its result, and an interrupted run resumes after the last step. Records are
in files that all processes write; everything that is found out about them is in a DuckDB database
(`store.py`). In addition to the shards, the work folder needs the size of the texts and about 900
bytes per distinct text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import lbr_ds
from lbr_ds.config import CONTROL, SPLITS, DataConfig, ModelConfig
from lbr_ds.corpora import audit, sources
from lbr_ds.corpora.collect import Collected, collect
from lbr_ds.corpora.curate import knowledge, language, leaks, trained_texts
from lbr_ds.corpora.curate.groups import drop_near_duplicates, find_families, group_records
from lbr_ds.corpora.curate.splits import divide
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import Records, Stored
from lbr_ds.corpora.token_counts import Room, room, tokenizer_json
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, PeerFailed, Unreachable
from lbr_ds.instructions import SIDES, Instructed
from lbr_ds.shards import Manifest, ShardFile, teacher, write_split
from lbr_ds.shards.in_use import refuse_in_use
from lbr_ds.shards.manifest import NAME
from lbr_ds.shards.sources import OTHERS
from lbr_ds.system.atomic import (
    atomic_folder,
    check_replaceable,
    is_unfinished,
    recover,
    try_recover,
)
from lbr_ds.system.failures import writing
from lbr_ds.system.process_pool import is_spread, kept_processes
from lbr_ds.system.progress import Progress, no_progress

log = logging.getLogger(__name__)
CURATION = "curation.json"
# Added by `mine` and `synthesize`: an audit, and cl as it was before.
MINING, GIVEN = "mining.json", "given"
SYNTHESIS, PASSAGES = "synthesis.json", "passages"
TEACHING, UNSCORED = "teacher.json", "unscored"
_RULES = 7  # increment it when the shards of a recipe change, so that old folders are remade


def prepare(
    data: DataConfig,
    seed: int,
    progress: Progress = no_progress,
    model: ModelConfig | None = None,
    bottleneck: int = 0,
    by_source: bool = False,
) -> dict[str, Any]:
    """Make `data.folder` from `data.sources`, or reuse it if it was made from the same.

    The same files, settings and seed give the same bytes. If anything is raised, an existing folder
    stays as it was.

    Args:
        data: The recipe's data section.
        seed: Decides the splits and the order of records in the shards.
        progress: Called with what has been done.
        model: The backbone whose tokenizer counts for `data.min_tokens`, `data.max_tokens` and
            instructions.
        bottleneck: The number of tokens that are added to each text.
        by_source: Whether each shard gets records of one source; it does also where
            `data.weighs_sources`.

    Returns:
        The content of curation.json, and `reused`.

    Raises:
        ConfigError: The folder contains anything but prepared data.
        DataError: The input is invalid, or a split cannot be filled.
        EnvironmentProblem: The disk is full.
    """
    _check(data)
    folder = check_replaceable(data.local_folder)
    refuse_foreign(folder)
    corpora = [sources.find(s, f"data.sources.{n}") for n, s in enumerate(data.sources)]
    table = [corpus.provenance() for corpus in corpora]
    tokenizer = _tokenizer(data, model)
    apart = {corpus.name for corpus in corpora} if by_source or data.weighs_sources else set()
    fingerprint = _fingerprint(data, seed, table, tokenizer, bool(apart))
    recover(folder, keep=fingerprint)
    if (kept := _reusable(folder, fingerprint)) is not None:
        try_recover(folder)
        log.info("%s is up to date, reused", folder)
        return {**kept, "reused": True}
    refuse_in_use(folder)
    with (
        writing(folder),
        atomic_folder(folder, key=fingerprint, check=refuse_foreign, keep_on=_resumed()) as new,
        closing(Store(new.parent)) as store,
        kept_processes(new.parent / "phases"),
    ):
        manifest = Manifest(new, {}, table, seed, fingerprint, lbr_ds.__version__)
        counter = new.parent / "tokenizer.json" if tokenizer else None
        if counter:
            counter.write_text(tokenizer, encoding="utf-8")
        if space := room(model, bottleneck, str(counter or "")):
            space.check(_stated_instructions(corpora))
        collected = collect(data, corpora, str(counter or ""), store, progress)
        made = _make(data, collected, store, manifest, space, apart, progress)
    return {**made, "reused": False}


def _resumed() -> tuple[type[Exception], ...]:
    """Return the errors after which the work is kept: of a server, or of a node among others."""
    return (EnvironmentProblem, PeerFailed, OSError) if is_spread() else (Unreachable,)


def _check(data: DataConfig) -> None:
    """Raise ConfigError for settings that nothing can be prepared with."""
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one corpus")
    for source in data.sources:
        sources.check(source)
    language.check(data.languages)


def _make(
    data: DataConfig,
    collected: Collected,
    store: Store,
    manifest: Manifest,
    space: Room | None,
    apart: set[str],
    progress: Progress,
) -> dict[str, Any]:
    """Divide what was read and write it to `manifest.folder`; return the audit.

    apart: The sources that get shards of their own; none: shards mix all sources.
    """
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
        "labels": store.write_labels,
    }
    for name, work in stages.items():
        if not store.recall(name):
            progress(name, 0, 1)
            with store.step():
                work()
                store.remember("collected", collected.to_dict())
                store.remember(name, True)
            progress(name, 1, 1)
    used = audit.instructions(store, data.split_names)
    if space:
        space.check(used.stated())
    manifest = replace(manifest, instructions=used)
    splits = _write_splits(data, store, manifest, apart, progress)
    manifest.save()
    made = _curation(data, splits, store, manifest, collected)
    proof = leaks.prove_no_leaks(manifest.folder, store, progress)
    made["leaks"] = proof.shared
    if known:
        made |= {
            "protocol": data.protocol,
            "entities": knowledge.entities_table(store),
            "eval_texts_in_gl": knowledge.eval_texts_in_gl(store),
        }
    trained_texts.write(manifest.folder, proof.trained)
    text = json.dumps(made, indent=1, ensure_ascii=False)
    (manifest.folder / CURATION).write_text(text + "\n", encoding="utf-8")
    return made


def _write_splits(
    data: DataConfig, store: Store, manifest: Manifest, apart: set[str], progress: Progress
) -> dict[str, Any]:
    """Write all splits and name their shards in the manifest; return their audits."""
    with closing(Records(store.files)) as read:
        stored = {name: Stored(read, store.seqs_of(name)) for name in data.split_names}
        for name, records in stored.items():
            manifest.splits[name] = _write(records, name, store, manifest, data, apart, progress)
        return audit.split_tables(store, stored, data.splits)


def _write(
    records: Stored,
    split: str,
    store: Store,
    manifest: Manifest,
    data: DataConfig,
    apart: set[str],
    progress: Progress,
) -> list[ShardFile]:
    """Write one split, unless an earlier run did."""
    kept = store.recall(f"write {split}")
    if kept:
        return [ShardFile(**shard) for shard in kept]
    shards = write_split(
        manifest.folder,
        split,
        records,
        seed=manifest.seed,
        records_per_shard=data.records_per_shard,
        resume=True,
        sources=_sources(store, records.seqs, apart) if apart else (),
        progress=progress,
    )
    with store.step():
        store.remember(f"write {split}", [vars(shard) for shard in shards])
    return shards


def _sources(store: Store, seqs: array[int], names: set[str]) -> list[str]:
    """Return the source of each record; OTHERS for one that is not among `names`."""
    known = {name: name for name in names}  # one string for all records of a source
    found = [OTHERS] * store.total
    for batch in store.batches("SELECT seq, source FROM records"):
        for seq, source in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            found[seq] = known.get(source, OTHERS)
    return [found[seq] for seq in seqs]


def _curation(
    data: DataConfig,
    splits: dict[str, Any],
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
        "splits": splits,
    }


def _stated_instructions(corpora: list[sources.Corpus]) -> Iterator[Instructed]:
    """Yield the recipe's instructions of each side of each source."""
    for corpus in corpora:
        for side in SIDES:
            where = f"data.sources {corpus.name}, instruction.{side}"
            yield Instructed(getattr(corpus.source.instruction, side), "", where)


def _tokenizer(data: DataConfig, model: ModelConfig | None) -> str:
    """Return the JSON of the tokenizer that counts; empty without limits in tokens."""
    if not data.counts_tokens:
        return ""
    if model is None:
        raise ConfigError("data.min_tokens and data.max_tokens need model.backbone to count with")
    return tokenizer_json(model)


def _fingerprint(
    data: DataConfig, seed: int, table: list[dict[str, Any]], tokenizer: str, by_source: bool
) -> str:
    """Return the hash of everything that decides the shards' bytes, provenance included."""
    plain = [_RULES, lbr_ds.__version__, seed, _settings(data), table, tokenizer]
    plain += ["by source"] if by_source else []
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _settings(data: DataConfig) -> dict[str, Any]:
    """Return the settings of the recipe that decide the bytes."""
    unread = {"folder", "workers", "size_exponent"}
    settings: dict[str, Any] = json.loads(data.model_dump_json(exclude=unread))
    for source in settings["sources"]:
        del source["weight"], source["temperature"]  # training reads these
    if data.protocol == "random":
        del settings["protocol"], settings["splits"]["control"]
        for source in settings["sources"]:
            del source["role"]
    return settings


def refuse_foreign(folder: Path) -> None:
    """Raise ConfigError if `folder` contains anything that lbr-ds did not write."""
    if not folder.exists():
        return
    cure = "choose another data.folder, or move it away"
    if not folder.is_dir():
        raise ConfigError(f"data.folder={folder} is a file; {cure}")
    entries = sorted(folder.iterdir())
    if entries and not (folder / NAME).is_file():
        raise ConfigError(f"data.folder={folder} has {entries[0].name!r} and no {NAME}; {cure}")
    for path in entries:
        files = (NAME, CURATION, trained_texts.NAME, MINING, SYNTHESIS, TEACHING, *teacher.FILES)
        ours = path.name in files or is_unfinished(path.name)
        if path.name in (*SPLITS, CONTROL, GIVEN, PASSAGES, UNSCORED) and path.is_dir():
            ours = all(
                below.suffix in (".tar", ".idx") or is_unfinished(below.name)
                for below in path.iterdir()
            )
        if not ours:
            raise ConfigError(f"data.folder={folder}: {path.name!r} is not all from lbr-ds; {cure}")


def _reusable(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the audit of a complete folder that was made from the same, else None."""
    if not (folder / NAME).is_file():
        return None
    try:
        manifest = Manifest.load(folder)
        if manifest.prepared != fingerprint:
            log.info("%s was made from other sources or settings; preparing it again", folder)
            return None
        for name in manifest.splits:
            manifest.check(name)
        manifest.beside(trained_texts.NAME)  # raises DataError if it is damaged
        made: dict[str, Any] = json.loads((folder / CURATION).read_bytes())
        return made
    except (DataError, OSError, ValueError) as error:
        log.warning("%s; preparing it again", error)
        return None
