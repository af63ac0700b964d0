"""The folder beside the data in which prepare works: kept when it is interrupted, for the next run
of the same recipe to go on in; removed otherwise."""

from __future__ import annotations

import errno
import fcntl
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import TextIO

from lbr_ds.errors import DataError


class WorkFolder:
    """`.NAME.FINGERPRINT` beside the folder NAME. Use with `with`; one process at a time.

    An error removes it: its cause is in the input or on the disk. An interrupt keeps it. Raises
    DataError when another process works in it.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.path = folder.with_name(f".{folder.name}.{fingerprint}")

    def __enter__(self) -> WorkFolder:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        mine = re.compile(rf"\.{re.escape(self.folder.name)}\.[0-9a-f]{{16}}")
        for path in self.folder.parent.iterdir():
            if mine.fullmatch(path.name) and path != self.path:
                _remove_stale(path)
        self.path.mkdir(exist_ok=True)
        lock = _lock(self.path)
        if lock is None:
            raise DataError(f"{self.folder}: another prepare is making it; wait for that")
        self._lock = lock
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, Exception):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def swap(made: Path, folder: Path) -> None:
    """Put `made` where `folder` is; the old one is left beside `made`, in a temporary folder."""
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


def _lock(path: Path) -> TextIO | None:
    """The open lock file, or None when another process holds it."""
    file = (path / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _remove_stale(path: Path) -> None:
    """Remove what an interrupted run of other settings left, unless it is at work."""
    lock = _lock(path)
    if lock is not None:
        shutil.rmtree(path, ignore_errors=True)
        lock.close()
