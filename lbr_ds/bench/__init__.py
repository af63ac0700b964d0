"""Benchmark suites of the package: run one by name, row by row.

    result = run_suite("gpu", rows=["mfu_stage1_0.5b"], minutes=4, out=Path("gpu.json"))
    result == {"suite": "gpu", "environment": {...}, "rows": [{"measure", "value", ...}], ...}

`suites.py` lists the suites and their rows with targets. A suite's module has a function
`measure(target, setting) -> Row`, which `run.py` calls for one row after the other. Both sides of a
ratio run alternately in one process (`interleaved`); a row keeps the median and the quartiles. The
comparisons with other trainers are in tests/benchmarks, and `lbr-ds bench cluster` is in
lbr_ds/cluster/benchmark.
"""

from __future__ import annotations

from lbr_ds.bench.measure import Row, Target, interleaved, ratio
from lbr_ds.bench.run import as_result, describe_row, run_suite, show_number, verdict
from lbr_ds.bench.setting import Setting
from lbr_ds.bench.suites import SUITES, find_suite

__all__ = [
    "SUITES",
    "Row",
    "Setting",
    "Target",
    "as_result",
    "describe_row",
    "find_suite",
    "interleaved",
    "ratio",
    "run_suite",
    "show_number",
    "verdict",
]
