"""The program measured against its peers and itself: a suite's name -> rows of ratios.

    result = run_suite("loader")
    result == {"suite": "loader", "environment": {...}, "rows": [{"measure", "value", ...}]}

A suite is one file here with a function `suite() -> list[Row]` and QUICK, the arguments that make a
short version of it, and its name in SUITES. Both sides of a ratio run in turn in one process
(`interleaved`); a row keeps the median and the quartiles.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import asdict
from typing import Any

from lbr_ds import environment
from lbr_ds.bench.measure import Row, interleaved, ratio
from lbr_ds.errors import ConfigError

__all__ = ["SUITES", "Row", "interleaved", "ratio", "run_suite", "tabled"]
SUITES = ("loader", "faults")


def run_suite(name: str, *, quick: bool = False) -> dict[str, Any]:
    """The result of a suite, or of its short version, JSON-ready.

    Raises ConfigError for an unknown name.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUITES)}"
        raise ConfigError(f"unknown suite {name!r}; {hint}")
    module = importlib.import_module(f"lbr_ds.bench.{name}")
    return tabled(name, module.suite(**(module.QUICK if quick else {})))


def tabled(name: str, rows: list[Row]) -> dict[str, Any]:
    """Rows with the machine that they were measured on."""
    return {"suite": name, "environment": environment.describe(), "rows": [asdict(r) for r in rows]}
