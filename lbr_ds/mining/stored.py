"""Texts and lists of numbers in files, read item by item: ranks share them without copies.

A set of texts NAME has two files: `NAME.utf8`, one text after the other, and `NAME.spans`, where
each begins and ends. `NAME.sha256` identifies them. A list of lists has `NAME-items.npy` and
`NAME-ends.npy`. Texts are read with pread and lists are memory-mapped, so that memory holds only
what is in use.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from lbr_ds.errors import DataError
from lbr_ds.instructions import Instructed, bare, instruction_of

_SPANS = 1 << 16  # numbers in memory before they are written
CURE = "remove this folder and run the command again, which makes it again"


class TextWriter:
    """Write texts, with their instructions if they have any (`Instructed`)."""

    def __init__(self, path: Path) -> None:
        """Create the files of the texts `path`; the parent folder exists."""
        self.path, self.count, self._place = path, 0, 0
        self._data = path.with_suffix(".utf8").open("wb")
        self._spans = path.with_suffix(".spans").open("wb")
        self._held = array("q")
        self._digest = hashlib.sha256()

    def append(self, text: str) -> None:
        """Write one text after the others."""
        where = text.where if isinstance(text, Instructed) else ""
        parts = [part.encode() for part in (where, instruction_of(text), bare(text))]
        self._data.write(b"".join(parts))
        for part in parts:
            self._place += len(part)
            self._held.append(self._place)
        add_text(self._digest, text)
        self.count += 1
        if len(self._held) >= _SPANS:
            self._flush()

    def _flush(self) -> None:
        self._held.tofile(self._spans)
        self._held = array("q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Complete the files."""
        self._flush()
        self._data.close()
        self._spans.close()
        self.path.with_suffix(".sha256").write_text(self._digest.hexdigest(), encoding="ascii")


class StoredTexts(Sequence[str]):
    """Texts on disk. Picklable.

    Args:
        path: As of `TextWriter`.
        bare: Whether the texts come without their instructions.

    Raises:
        DataError: A file is missing.
    """

    def __init__(self, path: Path, *, bare: bool = False) -> None:
        self.path, self.bare = path, bare
        try:
            self.digest = path.with_suffix(".sha256").read_text(encoding="ascii")
            size = path.with_suffix(".spans").stat().st_size
            # Row i: ends of the place, the instruction and the text that make up text i.
            self._spans = (
                np.memmap(path.with_suffix(".spans"), np.int64, "r").reshape(-1, 3)
                if size
                else np.empty((0, 3), np.int64)
            )
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: texts of `mine` cannot be read ({error}); {CURE}") from None
        self._file: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "bare": self.bare}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which: int | slice) -> str | list[str]:
        """Return a text, or several in a list."""
        if isinstance(which, slice):
            return [self[number] for number in range(*which.indices(len(self)))]
        number = range(len(self))[which]
        placed, instructed, end = self._spans[number].tolist()
        if self.bare or instructed == placed:
            return str(self._read(instructed, end), "utf-8")
        begin = int(self._spans[number - 1, 2]) if number else 0
        raw = self._read(begin, end)
        cuts = (0, placed - begin, instructed - begin, end - begin)
        where, instruction, text = (
            str(raw[cuts[i] : cuts[i + 1]], "utf-8") for i in range(len(cuts) - 1)
        )
        return Instructed(instruction, text, where)

    def _read(self, begin: int, end: int) -> bytes:
        path = self.path.with_suffix(".utf8")
        try:
            if self._file is None:
                self._file = os.open(path, os.O_RDONLY)
            raw = os.pread(self._file, end - begin, begin)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {CURE}") from None
        if len(raw) != end - begin:
            raise DataError(f"{path}: ends before byte {end}; {CURE}")
        return raw


def add_text(digest: Any, text: str) -> None:
    """Add a text and the length of its instruction to a hash of hashlib."""
    raw, begin = text.encode(), len(instruction_of(text))
    digest.update(f"{len(raw)}{f'-{begin}' if begin else ''}:".encode() + raw)


def digest_of(texts: Sequence[str]) -> str:
    """Return a hash of these texts with their instructions, in order."""
    if isinstance(texts, StoredTexts):
        return texts.digest
    digest = hashlib.sha256()
    for text in texts:
        add_text(digest, text)
    return digest.hexdigest()


class Lists(Sequence[NDArray[Any]]):
    """Lists of numbers, one after the other in one array; list i ends at `ends[i]`."""

    def __init__(self, items: NDArray[Any], ends: NDArray[np.int64]) -> None:
        self.items, self.ends = items, ends

    @classmethod
    def of(cls, items: NDArray[np.int64], owners: NDArray[np.int64], count: int) -> Lists:
        """Return `count` lists of those `items` that are not negative.

        owners: the list of each item, ascending.
        """
        kept = items >= 0
        return cls(items[kept], np.cumsum(np.bincount(owners[kept], minlength=count)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, which: Any) -> Any:
        """Return list number `which`."""
        begin = self.ends[which - 1] if which else 0
        return np.asarray(self.items[begin : self.ends[which]])

    def save(self, path: Path) -> None:
        """Write the lists `path`."""
        for name, part in (("items", self.items), ("ends", self.ends)):
            np.save(f"{path}-{name}.npy", part, allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> Lists:
        """Map the lists `path`. Raises DataError when they cannot be read."""
        items, ends = (load_array(Path(f"{path}-{name}.npy")) for name in ("items", "ends"))
        return cls(items, ends)


def load_array(path: Path) -> NDArray[np.int64]:
    """Map an array of numbers. Raises DataError when it cannot be read."""
    try:
        found: NDArray[np.int64] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: an array of `mine` cannot be read ({error}); {CURE}") from None
    return found
