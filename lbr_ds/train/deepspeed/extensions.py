"""Extensions that torch compiles at their first use, as DeepSpeed's Adam for the host.

Whoever compiles holds a file `lock`, and all others wait until it is gone. A process that is killed
meanwhile leaves its lock behind, and every later start would wait for good
(torch/utils/file_baton.py, torch 2.13).
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

log = logging.getLogger(__name__)
SECONDS = 300.0  # a compiler is done in one minute; a lock that is older has lost its owner


def wait_for_compiler(extension: str, seconds: float = SECONDS) -> None:
    """Return when nobody compiles `extension`; a lock older than `seconds` is removed, and said."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{extension}/lock"):
        told = False
        while (age := _age(lock)) is not None and age < seconds:
            if not told:
                log.info("%s: another process compiles, or was killed; waiting", lock)
            told = True
            time.sleep(min(1.0, seconds - age))
        if age is not None:
            # At once: another rank may have removed it too, and be about to take a lock of its own.
            lock.unlink(missing_ok=True)
            log.warning("%s: %.0f s old, so its owner was killed; removed", lock, age)


def _age(file: Path) -> float | None:
    """Seconds since it was written; None where there is none."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None
