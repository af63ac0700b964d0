"""See whether a thread that reads or writes large files makes progress."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from threading import Thread

# Read by calls, written by calls, and read through a mapping of a file.
_COUNTED = ("rchar", "wchar", "read_bytes")
_WAIT_AND_WRITE = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | _WRITE | _WAIT_AFTER


def bytes_moved(thread: Thread) -> int:
    """Return a number that rises with the bytes that a thread of this process reads and writes.

    It is 0 for a thread that does not run, and where the system does not count bytes.
    """
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/self/task/{thread.native_id}/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return sum(int(counts[name]) for name in _COUNTED)
    return 0


def flush_part(handle: int, start: int, length: int) -> None:
    """Write a part of a file to disk and wait for it. `fsync` is still needed afterwards.

    Where the system or the file system cannot do it, nothing happens.
    """
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function(handle, ctypes.c_int64(start), ctypes.c_int64(length), _WAIT_AND_WRITE)
