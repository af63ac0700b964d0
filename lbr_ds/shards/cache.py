"""Cache fetched shards on this disk: files named by their hash, up to a limit, for all ranks.

A file enters the cache only when it is complete and checked. It is fetched into `HASH.part`, which
has its full length from the start so that it counts towards the limit, and then renamed. One
process fetches a file while the others wait for it (a lock per first two digits of the hash). The
least recently opened files are removed first; a process that has one open can still read it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lbr_ds.errors import ConfigError, EnvironmentProblem

_ROOM = ".lock-room"  # held while files are counted or removed
_WAIT = 0.1  # seconds between checks for space that other processes occupy


def keep(folder: Path, name: str, length: int, limit: int, fetch: Callable[[Path], None]) -> Path:
    """Return a file of the cache; call `fetch(part)` to fill it if it is missing.

    Another process may remove the file before it is opened.

    Args:
        folder: The cache.
        name: The name of the file.
        length: Its length in bytes.
        limit: Bytes that all files of the folder may have together.
        fetch: Writes the file; what it raises is passed on.

    Raises:
        ConfigError: The file is longer than the limit.
        EnvironmentProblem: The folder cannot be written or locked.
    """
    path = folder / name
    if _use(path):
        return path
    if length > limit:
        raise ConfigError(
            f"data.cache_gib={limit / 2**30:.3g} is less than one shard of {length} bytes; raise it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(_stripe(folder, name)):
            if not _use(path):
                _fetch(path, length, limit, fetch)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise EnvironmentProblem(f"{folder}: the disk is full; free some space") from None
        raise EnvironmentProblem(
            f"{folder}: cannot be written or locked ({error.strerror}); "
            "name a folder on a local disk in LBR_DS_CACHE"
        ) from None
    return path


def _use(path: Path) -> bool:
    """Return whether the file exists, and mark it as the most recently used one."""
    try:
        os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a cache that this process may only read
        return path.is_file()
    return True


def _fetch(path: Path, length: int, limit: int, fetch: Callable[[Path], None]) -> None:
    part = path.with_suffix(".part")
    # This process has the lock, so a part with these digits is from one that was killed.
    for orphan in path.parent.glob(f"{path.name[:2]}*.part"):
        orphan.unlink(missing_ok=True)
    while not _reserve(part, length, limit):
        time.sleep(_WAIT)
    try:
        fetch(part)
        with _locked(path.parent / _ROOM):  # whoever counts sees exactly one of both names
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _reserve(part: Path, length: int, limit: int) -> bool:
    """Remove files until `length` bytes fit; return False if others are fetching too much."""
    with _locked(part.parent / _ROOM):
        held = []
        for path in part.parent.iterdir():
            if path.suffix not in (".tar", ".part") or _is_orphan(path):
                continue
            try:
                state = path.stat()
            except FileNotFoundError:  # a part that was just renamed or abandoned
                return False
            held.append((path.suffix == ".part", state.st_mtime_ns, state.st_size, path))
        excess = sum(size for *_, size, _ in held) + length - limit
        for on_its_way, _, size, path in sorted(held):
            if excess <= 0 or on_its_way:
                break
            path.unlink(missing_ok=True)
            excess -= size
        if excess > 0:
            return False
        with part.open("wb") as file:
            file.truncate(length)
        return True


def _is_orphan(part: Path) -> bool:
    """Return whether no process fetches into this part, and remove it then."""
    if part.suffix != ".part":
        return False
    try:
        with _locked(_stripe(part.parent, part.name), fcntl.LOCK_NB):
            part.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True


def _stripe(folder: Path, name: str) -> Path:
    return folder / f".lock-{name[:2]}"


@contextmanager
def _locked(path: Path, flag: int = 0) -> Iterator[None]:
    """Hold the lock of `path` among all processes of this node."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flag)
        yield
