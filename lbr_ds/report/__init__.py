"""Report on runs: `report.html`, `report.md`, `report.json`.

    report = write_report([Path("runs/demo")], Path("runs/demo"))

This room reads only run and data folders and imports neither torch nor mteb, so it works on a login
node. The HTML is one file without scripts and outside requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_ds.errors import ConfigError
from lbr_ds.report.by_source import contributions
from lbr_ds.report.collect import Run, read_run
from lbr_ds.report.compare import compare
from lbr_ds.report.reading import plain
from lbr_ds.report.render import render_html, render_markdown
from lbr_ds.system.atomic import write_json, write_text

__all__ = ["write_report"]


def write_report(runs: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the three files into the folder `output`; returns what report.json holds.

    What a run lacks is left out. `notes` names a missing recipe, data folder, stage or evaluation.
    Raises ConfigError without runs or for a folder that is no run; DataError for a file that
    cannot be read, with its name and line.
    """
    if not runs:
        raise ConfigError("no run to report on; give at least one run folder")
    read = [read_run(folder) for folder in runs]
    report = {"runs": [_summary(run) for run in read]}
    write_json(output / "report.json", report)
    write_text(output / "report.md", render_markdown(report))
    write_text(output / "report.html", render_html(report, read))
    return report


def _summary(run: Run) -> dict[str, Any]:
    """Everything that is shown of a run, except its curves."""
    return plain(
        {
            "name": run.name,
            "path": str(run.folder),
            "recipe": run.recipe,
            "stages": {str(stage.number): stage.summary() for stage in run.stages},
            "retrieval": compare(run.evals),
            "examples": run.examples(),
            "data": run.data,
            "contributions": contributions(run),
            "trained_on": run.trained_on,
            "environment": run.environment,
            "commands": run.commands(),
            "notes": run.notes,
        }
    )
