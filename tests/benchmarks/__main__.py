"""Run benchmark suites: `python -m tests.benchmarks all --json FILE`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Any

from lbr_ds.bench import Row, as_result
from lbr_ds.cli.bench import show_bench
from lbr_ds.distributed import end
from lbr_ds.errors import ConfigError, LbrError
from lbr_ds.system.atomic import write_json

ALL = ("attention", "stage1", "stage2", "encode", "peers")  # about half an hour on two cores
SUITES = {
    name: f"tests.benchmarks.{name}"
    for name in (*ALL, "prepare", "prepare_memory", "stream", "mining")
}

log = logging.getLogger(__name__ if __name__ != "__main__" else "tests.benchmarks")


def main() -> int:
    """Run what the command line names, print the rows and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "suite",
        help=f"all ({', '.join(ALL)}), one of these, prepare, prepare_memory, stream, mining",
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, help="also plot a step by length: a .png or .html")
    parser.add_argument("--data", type=Path, help="records or a prepared folder; default: demo's")
    parser.add_argument("--rounds", type=int, help="rounds of each row; default: the suite's")
    parser.add_argument(
        "--passages", type=_numbers, help="of `prepare`, `mining`: sizes, as 100000,1000000"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see every row once")
    args = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for own in ("lbr_ds", "tests"):
        logging.getLogger(own).setLevel(logging.INFO)
    names = ALL if args.suite == "all" else (args.suite,)
    rows = []
    for name in names:
        rows += run_suite(
            name, args.data, quick=args.quick, rounds=args.rounds, passages=args.passages
        )
    result = as_result(args.suite, rows)
    show_bench(result)
    if args.plot:
        from tests.benchmarks import plot

        result["points"] = plot.sweep(**(plot.QUICK if args.quick else {}))
        machine = result["environment"]
        plot.draw(result["points"], args.plot, machine.get("device", machine["processor"]))
    if args.json:
        write_json(args.json, result)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def run_suite(
    name: str,
    data: Path | None,
    *,
    quick: bool,
    rounds: int | None,
    passages: tuple[int, ...] | None = None,
) -> list[Row]:
    """Run one suite. Raises ConfigError for an unknown name."""
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; known: all, {', '.join(SUITES)}")
    module = importlib.import_module(SUITES[name])
    arguments: dict[str, Any] = dict(module.QUICK) if quick else {}
    given = {"data": data, "rounds": rounds, "passages": passages}
    taken = inspect.signature(module.suite).parameters
    arguments |= {key: value for key, value in given.items() if value is not None and key in taken}
    log.info("== %s", name)
    made: list[Row] = module.suite(**arguments)
    return made


if __name__ == "__main__":
    try:
        code = main()
    except LbrError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    end(code)  # of a process that has joined ranks
    sys.exit(code)
