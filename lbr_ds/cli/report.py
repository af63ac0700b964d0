"""`lbr-ds report`: curves, scores and examples of runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.system.failures import writing


def report(
    run: Annotated[list[Path], typer.Argument(help="One or more run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Output folder. Default: the first run folder."),
    ] = None,
) -> None:
    """Write a report of runs, with curves, scores and held-out examples.

    The report has three formats: report.html, report.md and report.json.

    Example: `lbr-ds report runs/demo`
    """
    from lbr_ds.report import write_report

    output = out or run[0]
    with writing(output):
        write_report(run, output)
    typer.echo(f"{output / 'report.html'}")
