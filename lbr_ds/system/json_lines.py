"""Read a JSON Lines file of this program, to which a process appends while it works."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of the file; [] without a file.

    An incomplete line is left out: the process was killed while writing it.
    """
    found: list[dict[str, Any]] = []
    # Not splitlines(), which also splits at characters that a text in JSON may contain.
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
