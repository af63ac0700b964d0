"""A piece of work in a process of its own that is killed at its n-th operation on files."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# Before each of these the interpreter tells an audit hook; what it reads is of no interest.
_EVENTS = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "ctypes.dlsym",
}
# Calls that change files and that have no audit event.
_CALLS = {"write", "flush", "close", "fsync", "flock", "pwrite", "ftruncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Count:
    """Operations on files so far; the process group is killed before number `last`.

    Forks of the process count on the same number, which is in shared memory.
    """

    def __init__(self, last: int) -> None:
        self.last, self._shared = last, memoryview(mmap.mmap(-1, 8)).cast("q")

    @property
    def number(self) -> int:
        return self._shared[0]

    def one(self) -> None:
        if self.number == self.last:
            os.killpg(0, signal.SIGKILL)
        self._shared[0] += 1

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """For sys.addaudithook."""
        if event in _EVENTS or (event == "open" and (arguments[2] or 0) & _WRITING):
            self.one()

    def profile(self, frame: FrameType, event: str, function: Any) -> None:
        """For sys.setprofile: torn writes too."""
        if event == "c_call" and function.__name__ in _CALLS:
            self.one()


def run(work: Callable[[], object], last: int = -1, *, writes: bool = False) -> int | None:
    """Do `work` in a fork, killed before operation `last` (-1: never).

    writes: count single writes, flushes and locks as well, which takes longer.

    Returns how many operations there were when it ended by itself, None when it was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        count = Count(last)
        sys.addaudithook(count.audit)
        if writes:
            sys.setprofile(count.profile)
        try:
            work()
            sys.setprofile(None)
            os.write(writer, str(count.number).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, "the work has failed; its traceback is in the output"
    return int(said)


def every_point(
    work: Callable[[], object], reset: Callable[[], None], *, writes: bool = False
) -> Iterator[int]:
    """Yield after each kill, at the first operation, the second, and so on until there is none."""
    last = 0
    while True:
        reset()
        if run(work, last, writes=writes) is not None:
            return
        yield last
        last += 1


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every name below a folder with the file's contents; None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
