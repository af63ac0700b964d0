"""raw -> records -> splits -> shards: everything that `lbr-ds prepare` does.

1. Find the sources' files and hash them; a folder made of the same is reused.
2. Read, clean, drop exact duplicates (`collect.py`, `cleaning.py`).
3. Unite what belongs together, divide it into gl, cl and eval (`splits.py`).
4. Write the shards beside the folder, prove from them that eval leaks nowhere (`leaks.py`).
5. Write manifest.json and curation.json, and rename the whole into place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import lbr_ds
from lbr_ds.config import SPLITS, DataConfig
from lbr_ds.corpora import curation, leaks, overlap
from lbr_ds.corpora.cleaning import Cleaner
from lbr_ds.corpora.collect import collect, reader_of
from lbr_ds.corpora.reading import Progress, source_name
from lbr_ds.corpora.splits import divide, unite
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.locate import locate
from lbr_ds.shards import Manifest, write_split
from lbr_ds.shards.manifest import NAME, file_sha256

log = logging.getLogger(__name__)
CURATION = "curation.json"
MINING, GIVEN = "mining.json", "given"  # what `mine` adds: its audit, and cl as prepare wrote it
_RULES = 1  # raise it when cleaning or dividing changes, so that old folders are made again


def prepare(data: DataConfig, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """Make `data.folder` from `data.sources`, or reuse it when it was made from the same.

    Returns what curation.json holds, and `reused`. The same files, settings and seed give the same
    bytes. Raises ConfigError when the folder holds anything but prepared data, DataError for bad
    input or splits that cannot be filled, EnvironmentProblem when the disk is full. Whatever is
    raised, an earlier folder stays as it was.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one corpus")
    for source in data.sources:
        reader_of(source)
    folder = data.local_folder.expanduser().resolve()
    _refuse_foreign(folder)
    files = [locate(source.path) for source in data.sources]
    sources = _provenance(data, files)
    fingerprint = _fingerprint(data, seed, sources)
    kept = _reusable(folder, fingerprint)
    if kept is not None:
        log.info("%s is up to date, reused", folder)
        if progress:
            progress("reused", 1, 1)
        return {**kept, "reused": True}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            manifest = Manifest(
                Path(beside) / "data", {}, sources, seed, fingerprint, lbr_ds.__version__
            )
            made = _make(data, files, manifest, progress)
            swap(manifest.folder, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise EnvironmentProblem(f"{folder}: the disk is full; free some space") from None
        raise EnvironmentProblem(f"{folder}: cannot be written ({error})") from None
    return {**made, "reused": False}


def _make(
    data: DataConfig, files: list[Path], manifest: Manifest, progress: Progress | None
) -> dict[str, Any]:
    """Read, divide and write everything into `manifest.folder`; returns the curation."""
    cleaner = Cleaner(data)
    collected = collect(data, files, cleaner, progress)
    components = unite(collected.records)
    divided = divide(components, data.splits, manifest.seed, cleaner.records)
    records = leaks.part_negatives(divided, cleaner.texts)
    for name in SPLITS:
        manifest.splits[name] = write_split(
            manifest.folder,
            name,
            records[name],
            seed=manifest.seed,
            records_per_shard=data.records_per_shard,
            progress=progress,
        )
    manifest.save()
    made: dict[str, Any] = {
        "fingerprint": manifest.fingerprint,
        "seed": manifest.seed,
        "sources": curation.sources_table(manifest.sources, collected),
        **curation.dropped_table(cleaner),
        "components": curation.components_table(components),
        "splits": curation.splits_table(records, divided, data.splits),
        "leaks": leaks.prove(manifest.folder),
    }
    overlap.write(manifest.folder)
    text = json.dumps(made, indent=1, ensure_ascii=False)
    (manifest.folder / CURATION).write_text(text + "\n", encoding="utf-8")
    return made


def _provenance(data: DataConfig, files: list[Path]) -> list[dict[str, Any]]:
    """What each source is: as the recipe names it, with the size and hash of its file."""
    table = []
    for source, path in zip(data.sources, files, strict=True):
        if not path.is_file():
            raise DataError(f"{path}: data.sources.path must be a file")
        table.append({
            "name": source_name(source, path),
            "path": source.path,
            "reader": source.reader,
            "license": source.license,
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        })  # fmt: skip
    return table


def _fingerprint(data: DataConfig, seed: int, sources: list[dict[str, Any]]) -> str:
    """Hash of all that decides the shards' bytes, the recipe's words on provenance included."""
    settings = json.loads(data.model_dump_json(exclude={"folder", "workers"}))
    plain = [_RULES, lbr_ds.__version__, seed, settings, sources]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_foreign(folder: Path) -> None:
    """Raise ConfigError when `folder` holds anything that prepare did not write."""
    if not folder.exists():
        return
    cure = "name another data.folder, or move that away"
    if not folder.is_dir():
        raise ConfigError(f"data.folder={folder} is a file; {cure}")
    entries = sorted(folder.iterdir())
    if entries and not (folder / NAME).is_file():
        raise ConfigError(f"data.folder={folder} holds {entries[0].name!r} and no {NAME}; {cure}")
    for path in entries:
        ours = path.name in (NAME, CURATION, overlap.NAME, MINING)
        if path.name in (*SPLITS, GIVEN) and path.is_dir():
            ours = all(below.suffix in (".tar", ".idx") for below in path.iterdir())
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
        for name in SPLITS:
            manifest.check(name)
        found: dict[str, Any] = json.loads((folder / CURATION).read_bytes())
        return found
    except (DataError, OSError, ValueError) as error:
        log.warning("%s; made again", error)
        return None


def swap(made: Path, folder: Path) -> None:
    """Put `made` where `folder` is; the old one goes with the temporary folder."""
    old = made.with_name("old")
    if folder.exists():
        folder.rename(old)
    try:
        made.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise DataError(f"{folder}: another prepare wrote it meanwhile; run again") from None
        raise
