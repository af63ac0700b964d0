"""Files of numbered values of any length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_END = 8  # bytes of the end of a value


class Values:
    """Write values of any length, numbered from 0 as they are added: a file of them, one of ends.

    Args:
        path: The file of the values; one that exists is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._files = path.open("wb"), _ends(path).open("wb")
        self._files[1].write(bytes(_END))  # the first end is 0
        self._end = 0

    def add(self, values: list[bytes]) -> None:
        """Append values."""
        self.add_joined(b"".join(values), np.fromiter(map(len, values), np.int64, len(values)))

    def add_joined(self, values: bytes, lengths: NDArray[np.int64]) -> None:
        """Append values that are joined already."""
        ends = self._end + np.cumsum(lengths)
        self._files[0].write(values)
        self._files[1].write(ends.astype("<i8").tobytes())
        self._end += len(values)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


class ValueReader:
    """Reads written values. A copy sent to another process opens the files again.

    Args:
        path: The file of the values.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return type(self), (self._path,)

    def __call__(self, number: int) -> bytes:
        """Return a value."""
        if self._files is None:
            self._files = self._path.open("rb"), _ends(self._path).open("rb")
        values, ends = self._files
        # Not memory maps: their pages would count as memory of this process.
        pair = os.pread(ends.fileno(), 2 * _END, number * _END)
        begin, end = _number(pair[:_END]), _number(pair[_END:])
        return os.pread(values.fileno(), end - begin, begin)

    def close(self) -> None:
        """Close this process's files."""
        for file in self._files or ():
            file.close()
        self._files = None


def _ends(path: Path) -> Path:
    return path.with_suffix(".ends")


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
