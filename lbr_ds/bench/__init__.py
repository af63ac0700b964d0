"""Benchmark suites of the package: run one by name and get a result that is ready for JSON.

    result = run_suite("loader", SUITES)
    result == {"suite": "loader", "environment": {...}, "rows": [{"measure", "value", ...}]}

A suite is a module with a function `suite(...) -> list[Row]`; one that works on texts takes `data`
(a file of records or a prepared folder), and one with a short version lists its arguments in QUICK.
Both sides of a ratio run alternately in one process (`interleaved`); a row keeps the median and the
quartiles. The comparisons with other trainers are in tests/benchmarks, and `lbr-ds bench cluster`
is in lbr_ds/cluster/benchmark.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lbr_ds.bench.measure import Row, interleaved, ratio
from lbr_ds.errors import ConfigError
from lbr_ds.system import environment

__all__ = ["SUITES", "Row", "as_result", "interleaved", "ratio", "run_suite"]
SUITES = {"gpu": "lbr_ds.bench.gpu", "loader": "lbr_ds.bench.loader"}  # name: module

log = logging.getLogger(__name__)


def run_suite(
    name: str,
    suites: Mapping[str, str] = SUITES,
    data: Path | None = None,
    *,
    quick: bool = False,
    rounds: int | None = None,
) -> list[Row]:
    """Run one suite.

    Args:
        name: a key of `suites`.
        suites: the module of each suite.
        data: texts, for suites that take them; None: the demo's corpus.
        quick: run the short version.
        rounds: rounds of each row, for suites that repeat; None: the suite's default.

    Raises:
        ConfigError: an unknown name, or a suite without a short version.
    """
    if name not in suites:
        near = difflib.get_close_matches(name, suites, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(suites)}"
        raise ConfigError(f"unknown suite {name!r}; {hint}")
    module = importlib.import_module(suites[name])
    arguments: dict[str, Any] = {}
    if quick:
        if not hasattr(module, "QUICK"):
            raise ConfigError(f"suite {name!r} has no short version; leave --quick out")
        arguments |= module.QUICK
    taken = inspect.signature(module.suite).parameters
    given = {"data": data, "rounds": rounds}
    arguments |= {key: value for key, value in given.items() if value is not None and key in taken}
    log.info("== %s", name)
    rows: list[Row] = module.suite(**arguments)
    return rows


def as_result(name: str, rows: list[Row]) -> dict[str, Any]:
    """Return rows with the description of the machine that they were measured on, JSON-ready."""
    return {"suite": name, "environment": environment.describe(), "rows": [asdict(r) for r in rows]}
