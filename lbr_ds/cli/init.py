"""`lbr-ds init`: start a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.system.failures import writing


def init(folder: Annotated[Path, typer.Argument(file_okay=False, help="A new folder.")]) -> None:
    """Copy recipes, ds_configs, SLURM scripts and examples into a new folder, for you to edit.

    Example: `lbr-ds init my-project`
    """
    from lbr_ds.system import resources

    with writing(folder):
        files = resources.copy_shipped(folder)
    typer.echo(
        f"{len(files)} files in {folder}: recipes/, ds_configs/, examples/, "
        "slurm/ (see slurm/README.md)"
    )
