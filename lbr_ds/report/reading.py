"""Read JSON and metrics files; errors name the file and the line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lbr_ds.errors import DataError
from lbr_ds.system import yaml_json


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a run. Raises DataError that names it."""
    cure = "make it again or remove it"
    return yaml_json.read_json(path, "a file of a run", DataError, cure, strict=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl in step order, of each step the last one (after a resume).

    Raises DataError that names the file and the line.
    """
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            step = row = None
        if not isinstance(row, dict) or not isinstance(step, int):
            shown = line[:60].decode("utf-8", "replace")
            raise DataError(
                f"{path}:{number}: not a JSON object with a whole number `step` "
                f"({shown!r}); remove the line"
            )
        rows[step] = row
    return [rows[step] for step in sorted(rows)]


def plain(value: Any) -> Any:
    """Return the value with None for every number that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: Any) -> float:
    """Return a JSON number as float, NaN for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else math.nan
