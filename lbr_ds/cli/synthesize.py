"""`lbr-ds synthesize`: queries for passages that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import EncodingRanks, Overrides, Recipe, join_or_launch
from lbr_ds.system.atomic import try_recover
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import public_url

Url = Annotated[
    str | None,
    typer.Option(
        help="Address of an OpenAI-compatible server, such as http://localhost:8000/v1. The same "
        "as synthesis.url=URL."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Name of the model on that server; without --url, a model to run on this machine. The "
        "same as synthesis.model=MODEL."
    ),
]


def synthesize(
    recipe: Recipe,
    overrides: Overrides = None,
    url: Url = None,
    model: Model = None,
    nproc: EncodingRanks = None,
) -> None:
    """Let a language model write queries for the plain passages of stage 2.

    Example: `lbr-ds synthesize medquad-documents --url http://localhost:8000/v1 --model NAME`
    """
    from lbr_ds.config import STAGES, load
    from lbr_ds.shards import Manifest

    given = {"synthesis.url": url, "synthesis.model": model}
    options = [f"{name}={value}" for name, value in given.items() if value is not None]
    run = load(recipe, [*(overrides or []), *options])
    folder = run.data.local_folder
    try_recover(folder)  # a killed command may have left it under another name
    Manifest.load(folder).records(STAGES[2].split)  # before torch is imported, which takes seconds
    from lbr_ds.synthesis.synthesize import synthesize as write_queries

    world = join_or_launch(nproc, run.engine.timeout_minutes)
    with show_progress() as progress, writing(public_url(run.data.folder)):
        audit = write_queries(run, progress, world)
    if audit is not None:
        show_synthesis(audit, folder)


def show_synthesis(audit: dict[str, Any], folder: Path) -> None:
    """Print what was kept and dropped, with examples."""
    console = Console()
    table = Table("queries", "count")
    table.add_row("written", str(audit["queries_written"]))
    table.add_row("kept", str(audit["kept"]))
    for reason, count in audit["dropped"].items():
        if count:
            table.add_row(f"dropped: {reason.replace('_', ' ')}", str(count))
    console.print(table)
    for example in audit["examples"]:
        rank = f"  (rank {example['rank']})" if "rank" in example else ""
        for line in (f"{example['query'][:110]}{rank}", f"    {example['passage'][:110]}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for reason, examples in audit["examples_dropped"].items():
        line = f"dropped, {reason.replace('_', ' ')}: {examples[0]['query'][:110]}"
        console.print(line, highlight=False, markup=False, soft_wrap=True, style="dim")
    reused = " (reused: nothing has changed)" if audit["reused"] else ""
    refused = audit["passages_refused_by_the_server"]
    note = f", of which the server refused {refused}" if refused else ""
    console.print(
        f"{audit['passages']} passages; {audit['passages_without_query']} have no query and are "
        f"not in cl{note}\nwritten to {folder}{reused}; details are in {folder / 'synthesis.json'}",
        highlight=False,
        soft_wrap=True,
    )
