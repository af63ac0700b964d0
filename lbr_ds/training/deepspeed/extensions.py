"""Wait for extensions that torch compiles at their first use, such as DeepSpeed's CPU Adam.

The process that compiles holds a file `lock`, and all others wait until it is removed. A process
that is killed while compiling leaves its lock behind, and every later start would wait forever
(torch/utils/file_baton.py, torch 2.13).
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
SECONDS = 300.0  # compiling takes about a minute; the owner of an older lock is dead


def wait_for_compiler(extension: str, seconds: float = SECONDS) -> None:
    """Return when no process compiles `extension`; a lock older than `seconds` is removed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{extension}/lock"):
        logged = False
        while (age := _age(lock)) is not None and age < seconds:
            if not logged:
                log.info("%s: another process is compiling, or was killed; waiting", lock)
            logged = True
            time.sleep(min(1.0, seconds - age))
        if age is not None:
            # Immediately: another rank may have removed it too, and may soon take its own lock.
            lock.unlink(missing_ok=True)
            log.warning("%s: %.0f s old, so its owner was killed; removed", lock, age)


def _age(file: Path) -> float | None:
    """Return the seconds since a file was written; None where there is none."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None
