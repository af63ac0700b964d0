"""`manifest.json`: what a prepared folder holds, where it comes from, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lbr_ds.errors import DataError

NAME = "manifest.json"
VERSION = 1  # of the layout; a folder of another version is prepared again
_FILE = re.compile(r"[a-z]+/[0-9]{5,}\.tar")  # a manifest can name nothing outside its folder
_AGAIN = "run `lbr-ds prepare` again"


@dataclass(frozen=True)
class ShardFile:
    """One tar: its path below the folder, its records, its length in bytes and its hash."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards of every split, and their provenance."""

    folder: Path
    splits: dict[str, list[ShardFile]]
    sources: list[dict[str, Any]]  # name, path, reader, license, bytes, sha256 of each
    seed: int
    fingerprint: str  # hash of everything that decides the bytes of the shards
    program: str  # version of lbr_ds that wrote it

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`.

        Raises DataError when there is none, or when it is not a manifest of this version.
        """
        path = folder / NAME
        try:
            raw = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder} holds no {NAME}; run `lbr-ds prepare` for this recipe, "
                "or point data.folder at a prepared folder"
            ) from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); {_AGAIN}") from None
        try:
            if raw["version"] != VERSION:
                found = raw["version"]
                raise DataError(f"{path}: version {found!r}, not {VERSION}; {_AGAIN}")
            splits = {
                name: [ShardFile(**shard) for shard in split["shards"]]
                for name, split in raw["splits"].items()
            }
            for shard in (shard for shards in splits.values() for shard in shards):
                if not _FILE.fullmatch(shard.file) or shard.records < 1 or shard.bytes < 1:
                    raise DataError(f"{path}: not a shard: {shard}; {_AGAIN}")
            return cls(
                folder, splits, raw["sources"], raw["seed"], raw["fingerprint"], raw["program"]
            )
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: not a manifest ({reason}); {_AGAIN}") from None

    @property
    def prepared(self) -> str:
        """The fingerprint that `prepare` gave; `mine` puts its own before it, with a dash."""
        return self.fingerprint.rpartition("-")[2]

    def save(self) -> None:
        """Write `folder/manifest.json`; the same manifest gives the same bytes."""
        splits = {
            name: {
                "records": sum(shard.records for shard in shards),
                "shards": [asdict(shard) for shard in shards],
            }
            for name, shards in self.splits.items()
        }
        plain = {"version": VERSION, "program": self.program, "fingerprint": self.fingerprint,
                 "seed": self.seed, "sources": self.sources, "splits": splits}  # fmt: skip
        text = json.dumps(plain, indent=1, ensure_ascii=False)
        (self.folder / NAME).write_text(text + "\n", encoding="utf-8")

    def shards(self, split: str) -> list[ShardFile]:
        """The shards of `split`, in file order. Raises DataError for a split it has not."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.folder / NAME}: no split {split!r}; it has {known}")
        return self.splits[split]

    def records(self, split: str) -> int:
        """The number of records of `split`."""
        return sum(shard.records for shard in self.shards(split))

    def check(self, split: str) -> None:
        """Raise DataError unless every shard of `split` is there and has its length (one stat)."""
        for shard in self.shards(split):
            try:
                found = (self.folder / shard.file).stat().st_size
            except FileNotFoundError:
                raise _missing(self.folder / shard.file) from None
            check_size(self.folder / shard.file, shard, found)


def check_size(path: Path, shard: ShardFile, found: int) -> None:
    """Raise DataError unless the tar at `path` is `shard.bytes` long."""
    if found != shard.bytes:
        what = "truncated" if found < shard.bytes else "too long"
        raise DataError(
            f"{path}: {what}, {found} bytes and not the manifest's {shard.bytes}; "
            f"copy the file again or {_AGAIN}"
        )


def _missing(path: Path) -> DataError:
    return DataError(f"{path}: the manifest names this shard and it is missing; {_AGAIN}")


def verify(
    folder: Path, progress: Callable[[str, int, int | None], None] | None = None
) -> Manifest:
    """Read every byte of every shard and compare it with its sha256; returns the manifest.

    Raises DataError that names the first missing, truncated or altered shard.
    """
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split]
    for split in manifest.splits:
        manifest.check(split)
    for done, shard in enumerate(shards, 1):
        found = file_sha256(folder / shard.file)
        if found != shard.sha256:
            raise DataError(
                f"{folder / shard.file}: altered, sha256 {found[:12]}.. and not the manifest's "
                f"{shard.sha256[:12]}..; copy the file again or {_AGAIN}"
            )
        if progress:
            progress("verify", done, len(shards))
    return manifest


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
