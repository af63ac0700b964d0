"""The program measured against its peers and itself: a suite's name -> rows of ratios.

    result = run_suite("loader")
    result == {"suite": "loader", "environment": {...}, "rows": [{"measure", "value", ...}]}

cluster/ is a suite of its own kind: it takes a recipe, and its rows are figures of a machine.

A suite is one file here with a function `suite() -> list[Row]`, and its name in SUITES; one that
works on texts takes `data`, a file of records or a prepared folder; one with a short version has
its arguments in QUICK. Both sides of a ratio run in turn in one process (`interleaved`); a row
keeps the median and the quartiles.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lbr_ds.bench.measure import Row, interleaved, ratio
from lbr_ds.errors import ConfigError
from lbr_ds.system import environment

__all__ = ["SUITES", "Row", "interleaved", "measured", "ratio", "run_suite", "tabled"]
SUITES = ("attention", "stage1", "stage2", "encode", "peers", "all", "gpu", "loader", "faults")

log = logging.getLogger(__name__)


def run_suite(name: str, data: Path | None = None, *, quick: bool = False) -> dict[str, Any]:
    """The result of a suite, or of its short version, JSON-ready.

    Raises ConfigError for an unknown name, and for a suite that has no short version.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUITES)}"
        raise ConfigError(f"unknown suite {name!r}; {hint}")
    return tabled(name, measured(name, data, quick=quick))


def measured(name: str, data: Path | None, *, quick: bool = False) -> list[Row]:
    """The rows of a suite; `data` goes to suites that take it."""
    module = importlib.import_module(f"lbr_ds.bench.{name}")
    arguments: dict[str, Any] = {}
    if quick:
        if not hasattr(module, "QUICK"):
            raise ConfigError(f"suite {name!r} has no short version; leave --quick out")
        arguments |= module.QUICK
    if "data" in inspect.signature(module.suite).parameters:
        arguments["data"] = data
    log.info("== %s", name)
    return module.suite(**arguments)


def tabled(name: str, rows: list[Row]) -> dict[str, Any]:
    """Rows with the machine that they were measured on."""
    return {
        "suite": name,
        "environment": environment.describe(),
        "rows": [asdict(r) for r in rows],
    }
