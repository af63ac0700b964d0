"""Read, write and check `manifest.json`: the shards of a prepared folder and their origin."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lbr_ds.errors import DataError
from lbr_ds.instructions import Instructions
from lbr_ds.shards.manifest_file import AGAIN, VERSION, ShardFile, digest, parse
from lbr_ds.shards.remote import Remote
from lbr_ds.system.locate import file_sha256
from lbr_ds.system.progress import Progress, no_progress
from lbr_ds.system.urls import CACHE_GIB, is_url

NAME = "manifest.json"
__all__ = ["NAME", "Manifest", "ShardFile", "check_size", "verify"]


@dataclass(frozen=True)
class Manifest:
    """The shards of every split, and their provenance."""

    folder: Path  # of the shards on this disk; of a URL: the cache
    splits: dict[str, list[ShardFile]]
    sources: list[dict[str, Any]]  # name, path, reader, license, bytes, sha256 of each
    seed: int
    fingerprint: str  # hash of everything that decides the bytes of the shards
    program: str  # version of lbr_ds that wrote it
    remote: Remote | None = None  # where the shards are fetched from
    instructions: Instructions = field(default_factory=Instructions)  # of the records, by source
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # others: bytes, sha256

    @classmethod
    def load(cls, folder: Path | str, cache_gib: float = CACHE_GIB) -> Manifest:
        """Read the manifest of a folder or of a URL.

        The manifest of a URL is fetched once per process, so that a run does not depend on it at
        every checkpoint.

        Args:
            folder: A prepared folder or its URL.
            cache_gib: Space on this disk for the shards of a URL.

        Raises:
            DataError: There is none, or it is not a manifest of this version.
        """
        if is_url(folder):
            remote = Remote(str(folder), cache_gib)
            text = _fetched(remote.url, NAME)
            if text is None:
                raise DataError(_none_in(remote.place))
            return cls._parse(text, remote.folder, remote)
        folder = Path(folder)
        try:
            text = (folder / NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_none_in(str(folder))) from None
        return cls._parse(text, folder, None)

    @classmethod
    def _parse(cls, text: bytes, folder: Path, remote: Remote | None) -> Manifest:
        content = parse(text, f"{remote.place if remote else folder}/{NAME}")
        return cls(
            folder,
            {name: list(split.shards) for name, split in content.splits.items()},
            [dict(source) for source in content.sources],
            content.seed,
            content.fingerprint,
            content.program,
            remote,
            Instructions.of(content.instructions),
            {name: file.model_dump() for name, file in content.files.items()},
        )

    @property
    def protocol(self) -> str:
        """`random`, or `knowledge` if there is a control split."""
        return "knowledge" if "control" in self.splits else "random"

    @property
    def prepared(self) -> str:
        """The fingerprint of `prepare`; `mine` prepends its own and a dash."""
        return self.fingerprint.rpartition("-")[2]

    def save(self) -> None:
        """Write `folder/manifest.json`; the same manifest gives the same bytes."""
        splits = {
            name: {
                "records": sum(shard.records for shard in shards),
                "shards": [shard.plain() for shard in shards],
            }
            for name, shards in self.splits.items()
        }
        plain: dict[str, Any] = {
            "version": VERSION,
            "program": self.program,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "sources": self.sources,
            "splits": splits,
        }
        if self.files:
            plain["files"] = self.files
        if self.instructions.any:
            plain["instructions"] = self.instructions.plain()
        plain["sha256"] = digest(plain)
        text = json.dumps(plain, indent=1, ensure_ascii=False)
        (self.folder / NAME).write_text(text + "\n", encoding="utf-8")

    @property
    def place(self) -> str:
        """The folder, or the URL without its secrets, for messages."""
        return self.remote.place if self.remote else str(self.folder)

    def where(self, shard: ShardFile) -> str:
        """Return a shard's name for messages."""
        return f"{self.place}/{shard.file}"

    def file(self, shard: ShardFile) -> Path:
        """Return the shard's tar on this disk; fetch and check it first if necessary.

        Another process may remove a fetched one at any time; an open one stays readable.

        Raises:
            DataError: The remote file is missing or altered.
            EnvironmentProblem: It cannot be reached.
        """
        if self.remote is None:
            return self.folder / shard.file
        return self.remote.file(shard.file, shard.bytes, shard.sha256)

    def beside(self, name: str) -> bytes | None:
        """Return the content of a file beside the manifest, None if there is none.

        A file of a URL that the manifest lists is fetched into the cache as a shard is; any other
        is kept by this process.

        Raises:
            DataError: The manifest lists the file, and its content differs.
        """
        listed = self.files.get(name)
        if self.remote is not None:
            if listed is None:
                return _fetched(self.remote.url, name)
            return self.remote.file(name, listed["bytes"], listed["sha256"]).read_bytes()
        path = self.folder / name
        content = path.read_bytes() if path.is_file() else None
        if listed is not None and (content is None or _facts_of(content) != listed):
            what = "missing" if content is None else "altered"
            raise DataError(f"{path}: {what}; copy the file again or {AGAIN}")
        return content

    def located(self, name: str) -> Path | None:
        """Return the path of a large file beside the manifest, None if the manifest has none.

        It is read once to check it, and not kept in memory. Raises as `beside` does.
        """
        listed = self.files.get(name)
        if listed is None:
            path = self.folder / name
            return path if self.remote is None and path.is_file() else None
        if self.remote is not None:
            return self.remote.file(name, listed["bytes"], listed["sha256"])
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing; copy the file again or {AGAIN}")
        if path.stat().st_size != listed["bytes"] or file_sha256(path) != listed["sha256"]:
            raise DataError(f"{path}: altered; copy the file again or {AGAIN}")
        return path

    def with_file(self, name: str) -> Manifest:
        """Return this manifest with the present size and hash of the file `name` beside it."""
        return replace(self, files={**self.files, name: _facts_of_file(self.folder / name)})

    def path_of(self, name: str) -> Path:
        """Return the path of a listed file on this disk; fetch and check it first if necessary."""
        if self.remote is None:
            return self.folder / name
        return self.remote.file(name, self.files[name]["bytes"], self.files[name]["sha256"])

    def shards(self, split: str) -> list[ShardFile]:
        """Return the shards of `split` in file order. Raises DataError for an unknown split."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.place}/{NAME}: no split {split!r}; it has {known}")
        return self.splits[split]

    def records(self, split: str) -> int:
        """Return the number of records of `split`."""
        return sum(shard.records for shard in self.shards(split))

    def check(self, split: str, part: int = 0, parts: int = 1) -> None:
        """Raise DataError unless every shard of `split` exists and has its length.

        Shards of a URL are checked when they are fetched.

        Args:
            split: The split.
            part: This process, of those that check every `parts`-th shard each.
            parts: The number of these processes.
        """
        for shard in self.shards(split)[part::parts] if self.remote is None else ():
            try:
                length = (self.folder / shard.file).stat().st_size
            except FileNotFoundError:
                raise DataError(
                    f"{self.where(shard)}: the manifest names this shard and it is missing; {AGAIN}"
                ) from None
            check_size(self.where(shard), shard, length)


def _facts_of(content: bytes) -> dict[str, Any]:
    """Return a manifest's entry for a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _facts_of_file(path: Path) -> dict[str, Any]:
    """Return the entry for a file that may not fit into memory."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


@lru_cache(maxsize=16)
def _fetched(url: str, name: str) -> bytes | None:
    return Remote(url, CACHE_GIB).read(name)


def _none_in(place: str) -> str:
    return (
        f"{place} holds no {NAME}; run `lbr-ds prepare` for this recipe, "
        "or point data.folder at a prepared folder"
    )


def check_size(where: str, shard: ShardFile, length: int) -> None:
    """Raise DataError unless the tar, which has `length` bytes, has its length."""
    if length != shard.bytes:
        what = "truncated" if length < shard.bytes else "too long"
        raise DataError(
            f"{where}: {what}: {length} bytes, but the manifest lists {shard.bytes}; "
            f"copy the file again or {AGAIN}"
        )


def verify(folder: Path | str, progress: Progress = no_progress) -> Manifest:
    """Compare every shard with its sha256; return the manifest.

    Raises:
        DataError: A shard is missing, truncated or altered; the first one is named.
    """
    manifest = Manifest.load(folder)
    shards = [shard for split in manifest.splits.values() for shard in split]
    for split in manifest.splits:
        manifest.check(split)
    for done, shard in enumerate(shards, 1):
        sha256 = file_sha256(manifest.file(shard))
        if sha256 != shard.sha256:
            raise DataError(
                f"{manifest.where(shard)}: altered: its sha256 is {sha256[:12]}.., but the "
                f"manifest lists {shard.sha256[:12]}..; copy the file again or {AGAIN}"
            )
        progress("verify", done, len(shards))
    return manifest
