"""Store the hashes of the training texts in `trained.u64`, which travels with the model.

Checkpoints and exports contain the file, and `evaluate` reads it before it scores, so that a model
is not evaluated unnoticed on texts that it was trained on.

Format: one line of JSON (version, the data's fingerprint, the number of hashes), then that many
little-endian u64 in ascending order. A hash is the first 8 bytes of `segmentation.key`, so texts
are compared after `normalise`; a million texts take 8 MB. The file of a model that was trained on
several datasets contains one such block for each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.leaks import TRAINED
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.errors import CheckpointError, DataError, LbrError
from lbr_ds.shards import Manifest, read_split
from lbr_ds.system.atomic import atomic_file

NAME = "trained.u64"
CURE = (  # for the file in prepared data
    "remove it and run `lbr-ds prepare` again, or set data.folder to a complete copy (of data at "
    "an address: prepare and upload it again)"
)
VERSION = 1


@dataclass(frozen=True)
class TrainedTexts:
    """The texts of gl and cl of one dataset, as sorted hashes."""

    fingerprint: str  # of the prepared data
    hashes: NDArray[np.uint64]

    @property
    def prepared(self) -> str:
        """The part of the fingerprint that `prepare` made, see `Manifest`."""
        return self.fingerprint.rpartition("-")[2]

    def holds(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Return for each text whether it was trained on, after normalisation."""
        hashes = _hashes(texts)
        if not len(self.hashes):
            return np.zeros(len(hashes), bool)
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return self.hashes[places] == hashes


def write(folder: Path) -> None:
    """Write `folder/trained.u64` from the shards of gl and cl; 8 bytes of memory per text.

    The manifest is written again with the size and hash of the file.

    Raises:
        DataError: A shard cannot be read.
    """
    manifest = Manifest.load(folder)
    splits = [name for name in TRAINED if name in manifest.splits]
    hashes = np.unique(_hashes(text for name in splits for text in _texts(folder, name)))
    save([TrainedTexts(manifest.fingerprint, hashes)], folder)
    manifest.with_file(NAME).save()


def of_data(place: Path | str) -> list[TrainedTexts]:
    """Return the training texts of a prepared folder or its URL; [] if it has no such file.

    Raises:
        DataError: The file is damaged.
        EnvironmentProblem: The URL cannot be reached.
    """
    manifest = Manifest.load(place)
    content = manifest.beside(NAME)
    if content is None:
        return []
    return _parse(content, f"{manifest.place}/{NAME}", DataError, CURE)


def load(folder: Path) -> list[TrainedTexts]:
    """Return the training texts of each dataset of a model, from its folder; [] without a file.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / NAME
    cure = "restore it from a copy of this folder, or use another checkpoint"
    return _parse(path.read_bytes(), str(path), CheckpointError, cure) if path.is_file() else []


def save(trained: Iterable[TrainedTexts], folder: Path) -> None:
    """Write `folder/trained.u64` atomically; nothing for no texts.

    Texts of the same prepared data become one block. Mining adds negatives to data that an earlier
    stage may have used without them: the block then has the hashes of both, and the later
    fingerprint.
    """
    united: dict[str, TrainedTexts] = {}
    for texts in trained:
        known = united.get(texts.prepared)
        hashes = texts.hashes if known is None else np.union1d(known.hashes, texts.hashes)
        united[texts.prepared] = replace(texts, hashes=hashes)
    if not united:
        return
    with atomic_file(folder / NAME) as file:
        for texts in united.values():
            head = {
                "version": VERSION,
                "fingerprint": texts.fingerprint,
                "count": len(texts.hashes),
            }
            file.write(json.dumps(head).encode() + b"\n")
            file.write(texts.hashes.astype("<u8").tobytes())


def _parse(content: bytes, where: str, kind: type[LbrError], cure: str) -> list[TrainedTexts]:
    blocks: list[TrainedTexts] = []
    place = 0
    while place < len(content) or not blocks:
        end = content.find(b"\n", place) + 1
        try:
            head = json.loads(content[place:end])
            place = end + 8 * int(head["count"])
            whole = head["version"] == VERSION and end <= place <= len(content)
            fingerprint = str(head["fingerprint"])
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise kind(f"{where}: not a valid {NAME}; {cure}")
        hashes = np.frombuffer(content, "<u8", (place - end) // 8, end).astype(np.uint64)
        blocks.append(TrainedTexts(fingerprint, hashes))
    return blocks


def _texts(folder: Path, split: str) -> Iterator[str]:
    for record in read_split(folder, split):
        yield from record.texts()  # without instructions: they make no text another one


def _hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    numbers = (int.from_bytes(key(text)[:8], "big") for text in texts)
    return np.fromiter(numbers, np.uint64)
