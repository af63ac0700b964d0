"""`lbr-ds demo`: the whole pipeline in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.cli.app import Overrides
from lbr_ds.system.failures import writing


def demo(
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Output folder. An unfinished demo in it is resumed."),
    ] = Path("lbr-demo"),
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ranks. Default: one per GPU, or two on a CPU."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline on a small real corpus and a small real model, in minutes.

    It prepares the data, trains both stages, exports the model, evaluates it and writes a report.

    Example: `lbr-ds demo --out lbr-demo`
    """
    from lbr_ds.demo import demo as run_demo

    with writing(out):
        run_demo(out, nproc, overrides or [])
