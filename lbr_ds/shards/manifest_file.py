"""The content of `manifest.json`: what it may contain, and how it is checked when it is read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from lbr_ds.errors import DataError, short
from lbr_ds.instructions import Instructions

VERSION = 3  # of the format; a folder of another version is refused
AGAIN = "run `lbr-ds prepare` again"
_FILE = re.compile(r"[a-z]+/[0-9]{5,}\.tar")  # a manifest can name nothing outside its folder
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardFile:
    """One tar: its path below the folder, number of records, length in bytes and hash.

    source: That of all its records, where shards are of one source each; else "".
    """

    file: str
    records: int
    bytes: int
    sha256: str
    source: str = ""

    def plain(self) -> dict[str, Any]:
        """Return the entry as JSON has it."""
        entry = asdict(self)
        return entry if self.source else {k: v for k, v in entry.items() if k != "source"}

    def is_valid(self) -> bool:
        """Return whether the entry is plausible and names no file outside its folder."""
        named = _FILE.fullmatch(self.file) and _SHA256.fullmatch(self.sha256)
        return bool(named) and self.records >= 1 and self.bytes >= 1


class _Split(BaseModel):
    """A split in the file."""

    records: int
    shards: list[ShardFile]


class _File(BaseModel):
    """Another file beside the manifest."""

    bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Content(BaseModel):
    """The whole file; `sha256` is that of all other entries (`digest`)."""

    version: int
    program: str
    fingerprint: str
    seed: int
    sources: list[dict[str, Any]]
    splits: dict[Annotated[str, Field(pattern="^[a-z]+$")], _Split]
    instructions: dict[str, Any] | None = None
    files: dict[str, _File] = Field(default_factory=dict)
    sha256: str


@lru_cache(maxsize=2)  # a stage loads one manifest about ten times, and loader processes inherit it
def parse(text: bytes, path: str) -> Content:
    """Return the checked content of a manifest, which the callers do not change."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({short(error)}); {AGAIN}") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if isinstance(raw, dict) and "version" in raw and version != VERSION:
        raise DataError(f"{path}: version {short(repr(version))}, not {VERSION}; {AGAIN}")
    try:
        content = Content.model_validate_json(text, strict=True)
        Instructions.of(content.instructions)
    except ValidationError as error:
        raise DataError(f"{path}: not a manifest ({_first(error)}); {AGAIN}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"instructions: {type(error).__name__}: {short(error)}"
        raise DataError(f"{path}: not a manifest ({reason}); {AGAIN}") from None
    for shard in (shard for split in content.splits.values() for shard in split.shards):
        if not shard.is_valid():
            raise DataError(f"{path}: not a shard: {short(repr(shard))}; {AGAIN}")
    if wrong := _disorder(content):
        raise DataError(f"{path}: {wrong}; copy it there again, or {AGAIN}")
    if content.sha256 != digest(raw):
        raise DataError(
            f"{path}: has been changed since it was written (its own sha256 differs); copy it "
            f"there again, or {AGAIN}"
        )
    return content


def _first(error: ValidationError) -> str:
    """Return the first error in a manifest's content, and where it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    return short(f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}")


def _disorder(content: Content) -> str:
    """Return the first contradiction between a manifest's entries, or ""."""
    for name, split in content.splits.items():
        if split.records != (total := sum(shard.records for shard in split.shards)):
            return f"split {name} has {split.records} records and its shards {total}"
        files = [shard.file for shard in split.shards]
        if len(set(files)) < len(files):
            return f"split {name} names a shard twice"
    return ""


def digest(plain: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's content without this hash, to notice lost entries."""
    rest = {name: value for name, value in plain.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
