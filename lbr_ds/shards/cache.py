"""Fetched shards on this disk: whole files named by their hash, up to a limit, shared by all ranks.

A file is in the cache only when it is whole and checked. It is fetched into `HASH.part`, which has
its full length from the start, so that what is on its way counts too, and then renamed. One process
fetches a file while the others wait for it (a lock for each first two digits of the hash). The
least recently opened files go first; a process that has one open keeps it until it closes it.
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

_ROOM = ".lock-room"  # held while files are counted or dropped
_WAIT = 0.1  # seconds until the next look for room that other processes' fetches take


def keep(folder: Path, name: str, length: int, limit: int, fetch: Callable[[Path], None]) -> Path:
    """The file `name` of the cache, `length` bytes; `fetch(part)` fills it when it is not there.

    limit: bytes that all files of the folder may have together. The file may be dropped again by
    another process before it is opened. Raises ConfigError when it is longer than the limit,
    EnvironmentProblem when the folder cannot be written or locked, and whatever `fetch` raises.
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
    """Whether the file is there; marks it as the most recently used one."""
    try:
        os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a cache that others fill and this process may only read
        return path.is_file()
    return True


def _fetch(path: Path, length: int, limit: int, fetch: Callable[[Path], None]) -> None:
    part = path.with_suffix(".part")
    # This process holds the lock, so a part with these first digits is of one that was killed.
    for orphan in path.parent.glob(f"{path.name[:2]}*.part"):
        orphan.unlink(missing_ok=True)
    while not _reserve(part, length, limit):
        time.sleep(_WAIT)
    try:
        fetch(part)
        with _locked(path.parent / _ROOM):  # whoever counts sees it under one of its names
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _reserve(part: Path, length: int, limit: int) -> bool:
    """Drop files until `length` more bytes fit and take them; False: others' fetches are in it."""
    with _locked(part.parent / _ROOM):
        held = []
        for path in part.parent.iterdir():
            if path.suffix not in (".tar", ".part") or _is_orphan(path):
                continue
            try:
                state = path.stat()
            except FileNotFoundError:  # a part that has just been renamed or given up
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
    """Whether nobody fetches into this part any more; it is removed then."""
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
    """Hold the lock of `path`, over all processes of this node."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flag)
        yield
