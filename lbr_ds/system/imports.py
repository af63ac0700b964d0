"""Import heavy libraries faster."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Import modules inside the block without Python's garbage collector.

    A program that trains has a million objects of its libraries' modules, which live as long as it
    does. While it imports them, the collector scans them again and again in vain: an eighth of the
    time. Later collections skip them as well (`gc.freeze`).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
