"""Run the fault campaign: `python -m tests.faults --json FILE [--quick]`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from lbr_ds.bench import as_result
from lbr_ds.cli.bench import show_bench
from lbr_ds.system.atomic import write_json
from tests.faults.campaign import LONG, SHORT, suite

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="a short version, minutes")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for own in ("lbr_ds", "tests"):
        logging.getLogger(own).setLevel(logging.INFO)
    result = as_result("faults", suite(SHORT if args.quick else LONG))
    show_bench(result)
    if args.json:
        write_json(args.json, result)
