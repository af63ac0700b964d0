"""Files and folders that appear whole, in one step, or not at all.

    write_json(path, value)
    with atomic_folder(target) as folder:
        ...

Data is written next to its target under a name that only this program uses
(`.NAME.lbr-XXXXXXXX.part`), flushed to disk, and then renamed. A process that is killed at any time
leaves either the old state or the new one; the next process that writes the same target removes its
leftovers. Files that this program did not make are never removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.system.locks import (
    USE_ANOTHER_FOLDER,
    Owner,
    flock_reaches_all_hosts,
    hidden_sibling,
    lock_folder,
    mount_points,
    try_flock,
)

log = logging.getLogger(__name__)
_FILE = re.compile(r"\..*\.lbr-[0-9a-f]{8}\.part", re.DOTALL)
_DAY = 24 * 3600.0
# Names inside the folder next to a target. `spent` marks work that is over and cannot be resumed.
_MARKER, _NEW, _OLD, _GONE, _SPENT = "lbr-ds.json", "new", "old", "gone", "spent"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_swept: set[Path] = set()  # folders in which this process has removed leftover files


def is_unfinished(name: str) -> bool:
    """Return whether this is the name of an unfinished file of this program."""
    return _FILE.fullmatch(name) is not None


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, in one step."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Write `value` to `path` as JSON and a newline, in one step."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path`, in one step, when the block ends without an error.

    A missing parent folder is created. Links are followed; devices and pipes are written directly.
    A file that is replaced keeps its permissions.

    Yields:
        The open file, in binary mode.

    Raises:
        OSError: the file cannot be written; `filename` is `path`.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_files(target.parent)
        part, opened = _open_part(target)
        with opened as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, target)
        fsync(target.parent)
    except BaseException as error:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename, error.filename2 = str(path), None
        raise


def link_file(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`, in one step; a copy where links fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = hidden_sibling(path, f"lbr-{secrets.token_hex(4)}.part")
    try:
        os.link(source, part)
    except OSError:
        with source.open("rb") as old, atomic_file(path) as new:
            shutil.copyfileobj(old, new)
        return
    try:
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # it stays where both are names of one file already
    fsync(path.parent)


def _open_part(target: Path) -> tuple[Path, BinaryIO]:
    """Open a new file next to `target`, locked so that no other process removes it."""
    while True:
        part = hidden_sibling(target, f"lbr-{secrets.token_hex(4)}.part")
        file = part.open("xb")
        if try_flock(file.fileno()) is not False and part.exists():
            return part, file
        file.close()


def _sweep_files(folder: Path) -> None:
    """Remove the unfinished files in `folder` whose writers have ended."""
    if folder in _swept:
        return
    _swept.add(folder)
    for entry in os.scandir(folder):
        if not _FILE.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
            locked = try_flock(file.fileno())
            known = locked is True and flock_reaches_all_hosts(folder)
            if known or (locked is not False and time.time() - entry.stat().st_mtime > _DAY):
                os.unlink(entry.path)
                log.info("removed %s, left by a process that was killed", entry.path)


def check_replaceable(folder: Path) -> Path:
    """Return the real path of a folder that is to be created or replaced as a whole.

    Raises:
        ConfigError: it is a file or a mount point, or it is or contains the working directory.
    """
    place = Path(os.path.realpath(folder))
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{folder} is a file; {USE_ANOTHER_FOLDER}")
    if os.path.ismount(place) or str(place) in {point for point, *_ in mount_points()}:
        raise ConfigError(
            f"{folder} is a mount point, which cannot be replaced in one step; use a folder in it "
            "(of a run run=..., of prepared data data.folder=...)"
        )
    if Path.cwd().is_relative_to(place):
        raise ConfigError(
            f"{folder} is or contains the working directory, which cannot be replaced in one step; "
            f"{USE_ANOTHER_FOLDER}, or run the command in another folder"
        )
    return place


def check_empty(folder: Path) -> None:
    """Raise ConfigError when `folder` exists and is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} exists and is not empty; give a new folder")


@contextlib.contextmanager
def atomic_folder(
    target: Path,
    *,
    key: str = "",
    check: Callable[[Path], object] = check_empty,
    keep_on: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """Build a folder that becomes `target`, in one step, when the block ends without an error.

    The folder is `.NAME.lbr-XXXXXXXX.part/new` next to the target. Its parent can hold temporary
    files, which are removed in the end. This process holds the lock of `target` meanwhile.

    Args:
        target: a folder that does not exist yet or, if `check` permits it, is replaced.
        key: letters and digits. With a key the work of a process that was killed or interrupted
            is kept, and the next process with the same key continues it.
        check: raises an error when `target` must not be replaced; called before and after.
        keep_on: with a key, errors after which the work is kept, too.

    Raises:
        ConfigError: from `check_replaceable` or `check`.
        EnvironmentProblem: another process holds the lock, or has created `target` meanwhile.
    """
    target = check_replaceable(target)
    with lock_folder(target, beside=True):
        recover(target, keep=key)
        check(target)
        with scratch_folder(target, key=key, keep_on=keep_on) as part:
            (part / _NEW).mkdir(exist_ok=True)
            yield part / _NEW
            for folder, _, files in os.walk(part / _NEW):
                for path in (*files, "."):
                    fsync(Path(folder, path))
            check(target)
            (part / _SPENT).touch()
            _replace_target(part, target)


@contextlib.contextmanager
def scratch_folder(
    target: Path, *, key: str = "", keep_on: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """Create a temporary folder next to `target` and remove it at the end.

    The process must hold the lock of `target`. key, keep_on: as in `atomic_folder`.
    """
    part = hidden_sibling(target, f"lbr-{key or secrets.token_hex(4)}.part")
    part.mkdir(exist_ok=bool(key))
    (part / _MARKER).write_text(json.dumps(asdict(Owner.this_process())) + "\n")
    try:
        yield part
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, keep_on)
        if not key or failed or (part / _SPENT).exists():
            _remove(part)
        raise
    _remove(part)


def recover(target: Path, *, keep: str = "") -> None:
    """Finish or remove what killed processes left of their work on `target`.

    A replacement that had begun is completed; other leftovers are removed, except the work under
    the key `keep`. Without leftovers nothing is written.

    Raises:
        EnvironmentProblem: another process holds the lock of `target`.
    """
    target = Path(os.path.realpath(target))
    mine = re.compile(re.escape(hidden_sibling(target, "lbr-").name) + r"(\w+\.part|lock)")
    leftovers = [p for p in sorted(target.parent.glob(".*.lbr-*")) if mine.fullmatch(p.name)]
    if not leftovers:
        return
    with lock_folder(target, beside=True):
        for part in leftovers:
            if part.suffix == ".part" and part.is_dir() and not part.is_symlink():
                _recover_from(part, target, part == hidden_sibling(target, f"lbr-{keep}.part"))


def try_recover(target: Path) -> None:
    """Call `recover` for a complete target; what cannot be removed now is left for later."""
    with contextlib.suppress(EnvironmentProblem, OSError):
        recover(target)


def _recover_from(part: Path, target: Path, wanted: bool) -> None:
    """Complete the replacement that `part` shows, if any; remove `part` unless it is wanted."""
    if not (part / _MARKER).is_file():
        with contextlib.suppress(OSError):  # killed before it wrote the marker, or not ours
            part.rmdir()
        return
    if not target.exists() and (part / _OLD).exists():
        os.rename(part / (_NEW if (part / _NEW).exists() else _OLD), target)
        log.info("%s: completed the replacement that a killed process had begun", target)
    if not wanted or (part / _SPENT).exists():
        _remove(part)
        log.info("removed %s, left by a process that was killed", part)


def _replace_target(part: Path, target: Path) -> None:
    """Move `part/new` to `target`; an old `target` is in `part` afterwards."""
    new, old = part / _NEW, part / _OLD
    try:
        if not target.exists() or not any(target.iterdir()):
            os.rename(new, target)
        elif not _swap(new, target):
            os.rename(target, old)  # until the next line `recover` finds `old` beside `new`
            os.rename(new, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.rename(old, target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise EnvironmentProblem(
                f"{target}: another process has written it meanwhile; run the command again"
            ) from None
        raise
    fsync(target.parent)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Return False if the file system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    names = os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    if rename(_AT_FDCWD, *names, _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove(part: Path) -> None:
    """Remove a temporary folder, its marker last, so that a later process can finish."""
    try:
        if (part / _OLD).exists():  # once partly removed it must not be restored
            os.rename(part / _OLD, part / _GONE)
        for path in part.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _MARKER:
                path.unlink()
        (part / _MARKER).unlink(missing_ok=True)
        part.rmdir()
    except OSError as error:
        log.warning("%s cannot be removed yet: %s", part, error.strerror)


def fsync(path: Path) -> None:
    """Flush a file's contents, or the names in a folder, to disk."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)
