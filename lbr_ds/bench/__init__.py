"""The program measured against its peers and itself: a suite's name -> rows of ratios.

    result = run_suite("loader")
    result == {"suite": "loader", "environment": {...}, "rows": [{"measure", "value", ...}]}

A suite is one file here with a function `suite() -> list[Row]`, and its name in SUITES; one that
works on texts takes `data`, a file of records or a prepared folder. Both sides
of a ratio run in turn in one process (`interleaved`); a row keeps the median and the quartiles.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lbr_ds import environment
from lbr_ds.bench.measure import Row, interleaved, ratio
from lbr_ds.errors import ConfigError

__all__ = ["SUITES", "Row", "interleaved", "measured", "ratio", "run_suite", "tabled"]
SUITES = ("attention", "stage1", "stage2", "encode", "peers", "all", "gpu", "loader")

log = logging.getLogger(__name__)


def run_suite(name: str, data: Path | None = None) -> dict[str, Any]:
    """The result of a suite, JSON-ready. Raises ConfigError for an unknown name."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUITES)}"
        raise ConfigError(f"unknown suite {name!r}; {hint}")
    return tabled(name, measured(name, data))


def measured(name: str, data: Path | None) -> list[Row]:
    """The rows of a suite; `data` goes to suites that take it."""
    suite = importlib.import_module(f"lbr_ds.bench.{name}").suite
    log.info("== %s", name)
    return suite(data=data) if "data" in inspect.signature(suite).parameters else suite()


def tabled(name: str, rows: list[Row]) -> dict[str, Any]:
    """Rows with the machine that they were measured on."""
    return {"suite": name, "environment": environment.describe(), "rows": [asdict(r) for r in rows]}
