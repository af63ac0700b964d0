"""Suite `all`: the rows of every suite of training and encoding, in one result.

`loader` measures data and `gpu` a device; they are asked for by name.
"""

from __future__ import annotations

from pathlib import Path

from lbr_ds.bench import measured
from lbr_ds.bench.measure import Row

PARTS = ("attention", "stage1", "stage2", "encode", "peers")


def suite(data: Path | None = None) -> list[Row]:
    """About 20 minutes on two cores."""
    return [row for name in PARTS for row in measured(name, data)]
