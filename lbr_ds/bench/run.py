"""Run a suite row by row: each row is shown and stored as soon as it is measured."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import math
import operator
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from lbr_ds.bench.measure import ROUNDS, Row, Target
from lbr_ds.bench.setting import Setting
from lbr_ds.bench.suites import find_suite
from lbr_ds.errors import ConfigError
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json
from lbr_ds.system.yaml_json import read_json

log = logging.getLogger(__name__)
Measure = Callable[[Target, Setting], Row]
QUICK_ROUNDS = 2
QUICK_SECONDS = 5.0  # what a row of the short version takes, for the time budget


class OutOfTimeError(Exception):
    """The time budget ended while a row was measured."""


def run_suite(
    name: str,
    *,
    rows: Sequence[str] = (),
    minutes: float | None = None,
    data: Path | None = None,
    quick: bool = False,
    rounds: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run the rows of a suite.

    Args:
        name: a key of SUITES.
        rows: names of the rows; none: all of them.
        minutes: time budget from the start of this process. Rows that cannot end within it are left
            out; one that is measured when it ends is abandoned.
        data: texts, for suites that take them.
        quick: tiny sizes, two rounds.
        rounds: rounds of each row of times; None: the suite's default.
        out: a file that holds the result at any time, as whole JSON. Rows that it has already from
            this suite on this machine, in this environment, are kept.

    Returns:
        The content of the file: {"suite", "environment", "quick", "rows", "left_out"}.

    Raises:
        ConfigError: an unknown suite or row, or data for a suite that takes none.
        LbrError: the suite cannot run here.
    """
    suite = find_suite(name)
    targets = suite.chosen(rows)
    if data is not None and not suite.takes_data:
        raise ConfigError(f"--data: the suite {name} takes no data; leave it out")
    budget = Budget(minutes)
    module = importlib.import_module(suite.module)
    setting = Setting(quick, rounds or (QUICK_ROUNDS if quick else ROUNDS), data)
    if hasattr(module, "check"):
        module.check(setting)
    result = _begin(name, quick, out)
    result["left_out"] = [target.measure for target in targets]
    order = [target.measure for target in suite.targets]
    _store(result, order, out)
    try:
        for number, target in enumerate(targets, 1):
            about = "" if quick else f", about {target.seconds:.0f} s"
            log.info("row %d of %d: %s%s", number, len(targets), target.measure, about)
            row = _measure_in_time(module.measure, target, setting, budget)
            if row is not None:
                result["left_out"].remove(target.measure)
                result["rows"] = [r for r in result["rows"] if r["measure"] != row.measure]
                result["rows"].append(asdict(row))
                _store(result, order, out)
                log.info("%s", describe_row(asdict(row), quick=quick))
    finally:
        setting.release()
    return result


def _measure_in_time(
    measure: Measure, target: Target, setting: Setting, budget: Budget
) -> Row | None:
    """Measure a row if the budget allows; None, with a log line, if it does not."""
    needs = QUICK_SECONDS if setting.quick else target.seconds
    if needs > budget.left():
        log.info("%s: left out, %s", target.measure, budget.lacks(needs))
        return None
    row = measure_row(measure, target, setting, budget)
    if row is None:
        log.info("%s: left out, the time budget ended while it ran", target.measure)
    return row


def measure_row(measure: Measure, target: Target, setting: Setting, budget: Budget) -> Row | None:
    """Measure a row. An error becomes a row without a value; None: the time budget has ended."""
    began, compiled = time.perf_counter(), _compile_seconds()
    try:
        with budget.enforced():
            row = measure(target, setting)
    except OutOfTimeError:
        setting.release()  # it may have been interrupted anywhere
        return None
    except Exception as error:  # out of memory, a kernel that is missing, a driver's fault
        log.debug("%s", target.measure, exc_info=True)
        row = target.not_measured(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        del error
        setting.release()
    finally:
        _free_memory()
    return replace(
        row,
        seconds=round(time.perf_counter() - began, 3),
        compile_seconds=round(_compile_seconds() - compiled, 3),
    )


class Budget:
    """The time that is left of `minutes`, counted from the start of this process."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        seconds = math.inf if minutes is None else 60 * minutes
        self._end = psutil.Process().create_time() + seconds

    def left(self) -> float:
        """Return the seconds that are left; infinity without a budget."""
        return self._end - time.time()

    def lacks(self, needs: float) -> str:
        """Say what is left and what a row needs."""
        return f"{max(0.0, self.left()):.0f} s are left and it may take {needs:.0f}"

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Raise OutOfTimeError in the block when the budget ends, in the main thread."""
        main = threading.current_thread() is threading.main_thread()
        if self.minutes is None or not main:
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            raise OutOfTimeError

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _begin(name: str, quick: bool, out: Path | None) -> dict[str, Any]:
    """Return the result so far: the rows of `out` if they were measured here, else none."""
    made = {
        "suite": name,
        "environment": environment.describe(),
        "quick": quick,
        "rows": [],
        "left_out": [],
    }
    if out is None or not out.is_file():
        return made
    try:
        old = read_json(out, "a benchmark result", ConfigError)
        same = _origin(old) == _origin(made)
    except (ConfigError, KeyError, AttributeError):
        same = False
    if same:
        log.info("%s: %d row(s) of an earlier call are kept", out, len(old["rows"]))
        return {**made, "rows": old["rows"]}
    log.info("%s: replaced, because its rows are from another suite, machine or version", out)
    return made


def _origin(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two results have in common if their rows belong together."""
    place = {k: v for k, v in result["environment"].items() if k != "slurm"}  # differs by job
    return result["suite"], result["quick"], place


def _store(result: dict[str, Any], order: list[str], out: Path | None) -> None:
    """Put the rows in the suite's order and write the file."""
    result["rows"].sort(key=lambda row: order.index(row["measure"]))
    if out is not None:
        write_json(out, result)


def as_result(name: str, rows: list[Row]) -> dict[str, Any]:
    """Return rows with the description of the machine that they were measured on, JSON-ready."""
    return {"suite": name, "environment": environment.describe(), "rows": [asdict(r) for r in rows]}


def describe_row(row: dict[str, Any], *, quick: bool) -> str:
    """Return a row as one line: its value, its targets and whether they are reached."""
    sign = ">=" if row["better"] == "higher" else "<="
    if row["value"] is None:
        return f"{row['measure']}: {row['about']}"
    bounds = (f"{sign}{show_number(row[bound])}" for bound in ("floor", "goal"))
    parts = ["must {}, goal {}".format(*bounds), verdict(row, quick)]
    if row["first_seconds"]:
        parts.append(f"first calls {row['first_seconds']:.1f} s")
    if row["compile_seconds"]:
        parts.append(f"compiling {row['compile_seconds']:.1f} s")
    return f"{row['measure']}: {show_number(row['value'])} {row['unit']} ({'; '.join(parts)})"


def show_number(value: float) -> str:
    """Return three significant digits, or a large number in thousands."""
    return f"{value:.3g}" if value < 10_000 else f"{value / 1000:,.3g}k"


def verdict(row: dict[str, Any], quick: bool) -> str:
    """Return which target a row reaches: goal, must or miss. Tiny sizes are not compared."""
    if row["value"] is None:
        return "not measured"
    if quick:
        return "tiny size"
    better = operator.ge if row["better"] == "higher" else operator.le
    if better(row["value"], row["goal"]):
        return "goal"
    return "must" if better(row["value"], row["floor"]) else "miss"


def _compile_seconds() -> float:
    """Return what torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
