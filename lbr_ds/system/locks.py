"""One process at a time writes in a folder: a lock that names its owner.

    with lock_folder(Path("runs/demo"), cure="wait, or give another run folder with run=..."):
        ...

The lock is a file: `.lbr-lock` in the folder, or `.NAME.lbr-lock` next to a folder that is replaced
as a whole (`atomic.atomic_folder`). It holds the owner as JSON, and its owner keeps an flock on it.

A process that is killed leaves the file behind. The next one takes it over with a log line when the
owner has ended: its flock is gone, its process is gone from this host, or SLURM says that the job
(or its step) no longer runs or has been requeued since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system.masking import mask_secrets

log = logging.getLogger(__name__)
USE_ANOTHER_FOLDER = "name another folder (run=... for a run, data.folder=... for prepared data)"
_NAME = "lbr-lock"
_LONGEST = 200  # bytes of a file name, or characters of a command, that are repeated in ours
_POLL_SECONDS = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_ONE_HOST = re.compile(r"9p|afs|beegfs|cifs|fuse|gpfs|lustre|nfs|smb|virtiofs")
_ALL_HOSTS = {"local_lock=none", "flock"}  # mount options of NFS and of Lustre
_read_locks: set[int] = set()  # descriptors of the files that this process reads
_held: dict[Path, int] = {}  # the locks of this process and their descriptors


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    host: str
    pid: int
    started: float  # of the process, in seconds since the epoch
    user: str
    command: str
    since: str
    job: str = ""  # SLURM's, with the number of its restarts and its step
    restart: int = 0
    step: str = ""

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process as an owner."""
        process, env = psutil.Process(), os.environ
        words = [Path(sys.argv[0]).name.replace("__main__.py", "lbr-ds"), *sys.argv[1:]]
        return cls(
            socket.gethostname(),
            process.pid,
            process.create_time(),
            process.username(),
            mask_secrets(shlex.join(words))[:_LONGEST],
            time.strftime("%Y-%m-%d %H:%M:%S %z"),
            env.get("SLURM_JOB_ID", ""),
            int(env.get("SLURM_RESTART_COUNT") or 0),
            env.get("SLURM_STEP_ID", "") if env.get("SLURM_JOB_ID") else "",
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return (
            f"`{self.command}` (process {self.pid} on {self.host}{job}, user {self.user}), "
            f"since {self.since}"
        )


@contextlib.contextmanager
def lock_folder(
    folder: Path, *, beside: bool = False, wait: bool = False, cure: str = ""
) -> Iterator[None]:
    """Hold the lock of `folder` while the block runs. A process may nest such blocks.

    Args:
        folder: created if it does not exist, unless the lock is beside it.
        beside: put the lock file next to the folder, for one that is replaced as a whole.
        wait: wait for another process that holds the lock.
        cure: what a user can do while another process holds the lock.

    Raises:
        EnvironmentProblem: another process holds the lock, and `wait` is False.
    """
    folder = Path(os.path.realpath(folder))
    (folder.parent if beside else folder).mkdir(parents=True, exist_ok=True)
    lock = hidden_sibling(folder, _NAME) if beside else folder / f".{_NAME}"
    if lock in _held:
        yield
        return
    cure = cure or f"wait until it has ended, or {USE_ANOTHER_FOLDER}"
    descriptor = _wait_and_take(lock, folder) if wait else _take(lock, folder, cure)
    _held[lock] = descriptor
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == process:  # not a fork that leaves by an exception
            del _held[lock]
            if _is_at(descriptor, lock):
                lock.unlink(missing_ok=True)
            os.close(descriptor)


def hidden_sibling(path: Path, suffix: str) -> Path:
    """Return `.NAME.SUFFIX` next to `path`; a long name is truncated."""
    return path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:_LONGEST])}.{suffix}")


def try_flock(descriptor: int) -> bool | None:
    """Lock an open file. Return False if another process holds it, None if locks do not work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _NO_LOCKS else False
    return True


@contextlib.contextmanager
def read_lock(file: Path) -> Iterator[None]:
    """Let `has_readers` see, until the block ends or this process does, that `file` is in use.

    It needs no permission to write, and any number of processes may hold it. Where the file cannot
    be opened or the file system has no locks, it does nothing.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        yield
        return
    _read_locks.add(descriptor)
    process = os.getpid()
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        if os.getpid() == process:  # not a fork that leaves by an exception
            _read_locks.remove(descriptor)
            os.close(descriptor)


def has_readers(file: Path) -> bool:
    """Whether a process holds the `read_lock` of a file, as far as this host can see."""
    try:
        # NFS grants the lock that is tried only to a file that is open for writing.
        descriptor = os.open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
    except OSError:
        return False
    try:
        return try_flock(descriptor) is False
    finally:
        os.close(descriptor)


@functools.cache
def flock_reaches_all_hosts(place: Path) -> bool:
    """Return whether other hosts that see this folder also see its locks."""
    mounts = {Path(point): (kind, options) for point, kind, options in mount_points()}
    for folder in (place, *place.parents):
        if folder in mounts:
            kind, options = mounts[folder]
            return not _ONE_HOST.match(kind) or not _ALL_HOSTS.isdisjoint(options.split(","))
    return True


def mount_points() -> list[tuple[str, str, str]]:
    """Return (path, type of file system, options) of every mount that this process sees."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in lines.splitlines():
        before, _, after = line.partition(" - ")
        point, options, kind = before.split()[4], after.split()[-1], after.split()[0]
        path = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)
        found.append((path, kind, options))
    return found


def _wait_and_take(lock: Path, folder: Path) -> int:
    """Wait until no other process holds the lock, take it, and return the open lock file."""
    said = False
    while True:
        try:
            return _take(lock, folder, "waiting")
        except EnvironmentProblem as error:
            if not said:
                log.info("%s", error)
            said = True
            time.sleep(_POLL_SECONDS)


def _take(lock: Path, folder: Path, cure: str) -> int:
    """Take the lock and return the open lock file, which names this process as the owner."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        locked = try_flock(descriptor)
        try:
            before = _read(descriptor)
            if before is None and locked is False:
                holder = "another process"
            elif before is None or _has_ended(before, locked, lock.parent):
                holder = ""
            else:
                holder = str(before)
            if holder:
                raise EnvironmentProblem(
                    f"{folder} is in use by {holder}; {cure} (if that process is certainly "
                    f"gone, remove {lock})"
                )
            if before is not None and locked is False:
                lock.unlink(missing_ok=True)  # the file server still keeps the lock of a dead host
            if _is_at(descriptor, lock):
                if before is not None:
                    log.info("%s: taken over from %s, which has ended", folder, before)
                text = json.dumps(asdict(Owner.this_process())) + "\n"
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, text.encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner has just removed it


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Owner | None:
    """Return the owner in a lock file; None if it is new or its writing was interrupted."""
    try:
        found = json.loads(os.pread(descriptor, 1 << 16, 0))
        return Owner(**{field.name: found[field.name] for field in fields(Owner)})
    except (ValueError, TypeError, KeyError):
        return None


def _has_ended(owner: Owner, locked: bool | None, place: Path) -> bool:
    """Return whether the owner of a lock no longer runs; locked: what `try_flock` returned."""
    if owner.host == socket.gethostname():
        return locked is True or (locked is None and not _runs_here(owner))
    this = Owner.this_process()
    if owner.job and owner.job == this.job and owner.restart != this.restart:
        return True
    running = _slurm_runs(owner) if owner.job else None
    if running is not None:
        return not running
    return locked is True and flock_reaches_all_hosts(place)


def _runs_here(owner: Owner) -> bool:
    try:
        return abs(psutil.Process(owner.pid).create_time() - owner.started) < 2
    except psutil.NoSuchProcess:
        return False


def _slurm_runs(owner: Owner) -> bool | None:
    """Return whether SLURM still runs the owner's step or job; None if it cannot be asked."""
    what = ["--jobs", owner.job, "--states", "RUNNING,SUSPENDED,COMPLETING,STOPPED"]
    if owner.step:
        what = ["--steps", f"{owner.job}.{owner.step}"]
    try:
        done = subprocess.run(
            ["squeue", "--noheader", *what], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return False if "nvalid job id" in done.stderr else None
    return bool(done.stdout.strip())


def _forget_in_fork() -> None:
    """Release the locks in a fork, which would hold them after its parent was killed."""
    for descriptor in (*_held.values(), *_read_locks):
        os.close(descriptor)
    _held.clear()
    _read_locks.clear()


os.register_at_fork(after_in_child=_forget_in_fork)
