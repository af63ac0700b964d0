"""Store the hashes of the training texts in `trained.u64`, which travels with the model.

Checkpoints and exports contain the file, and `evaluate` reads it before it scores, so that a model
is not evaluated unnoticed on texts that it was trained on.

Format: one line of JSON (version, the data's fingerprint, the number of hashes), filled with blanks
to a multiple of 8 bytes, then that many little-endian u64 in ascending order. A hash is the first 8
bytes of `segmentation.key`, so texts are compared after `normalise`. The hashes of 100 million
texts take 800 MB, so they are mapped and not read into memory. The file of a model that was trained
on several datasets contains one such block for each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from lbr_ds.corpora.curate.leaks import TRAINED, read_keys
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.stored import distinct
from lbr_ds.errors import CheckpointError, DataError, LbrError
from lbr_ds.shards import Manifest
from lbr_ds.system.atomic import atomic_file, link_file

NAME = "trained.u64"
CURE = (  # for the file in prepared data
    "remove it and run `lbr-ds prepare` again, or set data.folder to a complete copy (of data at "
    "an address: prepare and upload it again)"
)
VERSION = 1
_PART = 1 << 20  # hashes that are written at once
_HEAD = 4096  # bytes that a line of JSON may have


@dataclass(frozen=True)
class TrainedTexts:
    """The texts of gl and cl of one dataset.

    Attributes:
        fingerprint: Of the prepared data.
        hashes: Of the texts, ascending.
        file: The file that has these hashes and no others, if there is one.
    """

    fingerprint: str
    hashes: NDArray[np.uint64]
    file: Path | None = None

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


def write(folder: Path, hashes: NDArray[np.uint64] | None = None) -> None:
    """Write `folder/trained.u64` from the shards of gl and cl; 8 bytes of memory per text.

    The manifest is written again with the size and hash of the file.

    Args:
        folder: The prepared data.
        hashes: What has been read from the shards already, sorted and distinct.

    Raises:
        DataError: A shard cannot be read.
    """
    manifest = Manifest.load(folder)
    if hashes is None:
        splits = [name for name in TRAINED if name in manifest.splits]
        seen = [shard.hashes() for name in splits for shard in read_keys(folder, name)]
        hashes = distinct(np.concatenate([np.empty(0, np.uint64), *seen]))
    save([TrainedTexts(manifest.fingerprint, hashes)], folder)
    manifest.with_file(NAME).save()


def of_data(place: Path | str) -> list[TrainedTexts]:
    """Return the training texts of a prepared folder or its URL; [] if it has no such file.

    Raises:
        DataError: The file is damaged.
        EnvironmentProblem: The URL cannot be reached.
    """
    manifest = Manifest.load(place)
    path = manifest.located(NAME)
    return [] if path is None else _parse(path, f"{manifest.place}/{NAME}", DataError, CURE)


def load(folder: Path) -> list[TrainedTexts]:
    """Return the training texts of each dataset of a model, from its folder; [] without a file.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / NAME
    cure = "restore it from a copy of this folder, or use another checkpoint"
    return _parse(path, str(path), CheckpointError, cure) if path.is_file() else []


def save(trained: Iterable[TrainedTexts], folder: Path) -> None:
    """Write `folder/trained.u64` atomically; nothing for no texts, or if it is the same already.

    A file that has the same texts is linked. Texts of the same prepared data become one block.
    Mining adds negatives to data that an earlier stage may have used without them: the block then
    has the hashes of both, and the later fingerprint.
    """
    united: dict[str, TrainedTexts] = {}
    for texts in trained:
        known = united.get(texts.prepared)
        if known is not None and not _equal(known.hashes, texts.hashes):
            both = _union(known.hashes, texts.hashes, folder)
            texts = replace(texts, hashes=both, file=None)
        united[texts.prepared] = texts
    if not united or _are_in(folder, list(united.values())):
        return
    if len(united) == 1 and (whole := next(iter(united.values())).file) is not None:
        link_file(whole, folder / NAME)
        return
    with atomic_file(folder / NAME) as file:
        for texts in united.values():
            head = json.dumps(
                {
                    "version": VERSION,
                    "fingerprint": texts.fingerprint,
                    "count": len(texts.hashes),
                }
            ).encode()
            file.write(head + b" " * (-(len(head) + 1) % 8) + b"\n")
            for first in range(0, len(texts.hashes), _PART):
                file.write(texts.hashes[first : first + _PART].astype("<u8").tobytes())


def _are_in(folder: Path, texts: list[TrainedTexts]) -> bool:
    """Return whether the folder's file has exactly these texts."""
    try:
        now = load(folder)
    except CheckpointError:
        return False
    return [t.fingerprint for t in now] == [t.fingerprint for t in texts] and all(
        _equal(a.hashes, b.hashes) for a, b in zip(now, texts, strict=True)
    )


def _equal(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> bool:
    """Return whether two arrays are equal; a part of each is in memory at a time."""
    return len(one) == len(other) and all(
        np.array_equal(one[first : first + _PART], other[first : first + _PART])
        for first in range(0, len(one), _PART)
    )


def _union(one: NDArray[np.uint64], other: NDArray[np.uint64], folder: Path) -> NDArray[np.uint64]:
    """Return the distinct hashes of two arrays in ascending order, in a file without a name."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        for part in merged(one, other):
            file.write(part.tobytes())
        file.flush()
        return np.memmap(file, np.uint64, "r") if file.tell() else np.empty(0, np.uint64)


def merged(
    one: NDArray[np.uint64], other: NDArray[np.uint64], most: int = _PART
) -> Iterator[NDArray[np.uint64]]:
    """Yield the distinct hashes of two ascending arrays in ascending order, in parts.

    most: Of the hashes of each array that a part is made from.
    """
    arrays, starts = (one, other), [0, 0]
    while any(start < len(array) for array, start in zip(arrays, starts, strict=True)):
        parts = [a[start : start + most] for a, start in zip(arrays, starts, strict=True)]
        last = min(part[-1] for part in parts if len(part))
        taken = [int(np.searchsorted(part, last, "right")) for part in parts]
        yield np.union1d(*(part[:count] for part, count in zip(parts, taken, strict=True)))
        starts = [start + count for start, count in zip(starts, taken, strict=True)]


def _parse(path: Path, where: str, kind: type[LbrError], cure: str) -> list[TrainedTexts]:
    blocks: list[TrainedTexts] = []
    place, length = 0, path.stat().st_size
    with path.open("rb") as file:
        while place < length or not blocks:
            file.seek(place)
            line = file.readline(_HEAD)
            end = place + len(line)
            try:
                head = json.loads(line)
                place = end + 8 * int(head["count"])
                whole = head["version"] == VERSION and end <= place <= length
                fingerprint = str(head["fingerprint"])
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise kind(f"{where}: not a valid {NAME}; {cure}")
            blocks.append(TrainedTexts(fingerprint, _mapped(path, end, (place - end) // 8)))
    return [replace(blocks[0], file=path)] if len(blocks) == 1 else blocks


def _mapped(path: Path, start: int, count: int) -> NDArray[np.uint64]:
    """Return `count` hashes from byte `start` of a file, which stay there."""
    if not count:
        return np.empty(0, np.uint64)
    hashes = np.memmap(path, "<u8", "r", start, (count,))
    return hashes if start % 8 == 0 else hashes.astype(np.uint64)


def _hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    numbers = (int.from_bytes(key(text)[:8], "big") for text in texts)
    return np.fromiter(numbers, np.uint64)
