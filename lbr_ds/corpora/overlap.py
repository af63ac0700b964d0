"""Prepared data -> `trained.u64`: the hashes of its training texts, for the model to carry.

Layout: one line of JSON (version, the data's fingerprint, the number of hashes), then so many
little-endian u64 in ascending order. A hash is the first 8 bytes of `segment.key`, so texts are
compared as `normalise` leaves them; a million texts are 8 MB. Checkpoints and exports carry the
file, and `evaluate` asks it before it scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.leaks import TRAINED
from lbr_ds.corpora.segment import key
from lbr_ds.errors import DataError
from lbr_ds.shards import Manifest, read_split

NAME = "trained.u64"
VERSION = 1


@dataclass(frozen=True)
class TrainedTexts:
    """The texts of gl and cl that a model may have seen, as sorted hashes."""

    fingerprint: str  # of the prepared data
    hashes: NDArray[np.uint64]

    @property
    def prepared(self) -> str:
        """The part of the fingerprint that `prepare` gave, as of `Manifest`."""
        return self.fingerprint.rpartition("-")[2]

    def holds(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """For each of `texts`, whether training had it (normalised)."""
        asked = _hashes(texts)
        if not len(self.hashes):
            return np.zeros(len(asked), bool)
        places = np.searchsorted(self.hashes, asked).clip(max=len(self.hashes) - 1)
        return self.hashes[places] == asked


def write(folder: Path) -> None:
    """Write `folder/trained.u64` from the shards of gl and cl (8 bytes of memory a text).

    Raises DataError when a shard cannot be read.
    """
    manifest = Manifest.load(folder)
    splits = [name for name in TRAINED if name in manifest.splits]
    hashes = np.unique(_hashes(text for name in splits for text in _texts(folder, name)))
    head = {"version": VERSION, "fingerprint": manifest.fingerprint, "count": len(hashes)}
    content = json.dumps(head).encode() + b"\n" + hashes.astype("<u8").tobytes()
    (folder / NAME).write_bytes(content)


def load(folder: Path) -> TrainedTexts | None:
    """The file in `folder`, or None when there is none. Raises DataError for a damaged one."""
    path = folder / NAME
    if not path.is_file():
        return None
    line, _, body = path.read_bytes().partition(b"\n")
    try:
        head = json.loads(line)
        whole = head["version"] == VERSION and len(body) == 8 * head["count"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{path}: damaged; copy it again from the data folder or the checkpoint")
    return TrainedTexts(head["fingerprint"], np.frombuffer(body, "<u8").astype(np.uint64))


def copy(data: Path | str, model: Path) -> None:
    """Put the data's file into a model's folder; data prepared by an older version has none."""
    content = Manifest.load(data).beside(NAME)
    if content is not None:
        (model / NAME).write_bytes(content)


def _texts(folder: Path, split: str) -> Iterator[str]:
    for record in read_split(folder, split):
        yield from record.texts()  # without instructions: they make no text another one


def _hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    numbers = (int.from_bytes(key(text)[:8], "big") for text in texts)
    return np.fromiter(numbers, np.uint64)
