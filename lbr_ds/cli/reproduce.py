"""`lbr-ds reproduce`: the paper's tables with a recipe of yours."""

from __future__ import annotations

from typing import Annotated

import typer

from lbr_ds.cli.app import JsonFile, MaxQueries, Overrides, Recipe
from lbr_ds.system.failures import check_writable, writing

TableName = Annotated[
    str,
    typer.Argument(
        help="table1 to table6 or figure3 of the paper, or one of ours: counts, bottleneck, "
        "beyond, forgetting."
    ),
]
Seeds = Annotated[
    str,
    typer.Option(
        help="Comma-separated seeds of training, such as 0,1,2. Default: the recipe's seed."
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of ranks of each training. Default: one per GPU; with --jobs, one."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the numbered jobs without running them.")
]
Only = Annotated[
    int | None, typer.Option(help="Run only the job with this number in the list of --dry-run.")
]
Jobs = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of jobs that run at once, on one device or distributed over the GPUs.",
    ),
]


def reproduce(
    table: TableName,
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Seeds = "",
    out: JsonFile = None,
    nproc: Ranks = None,
    max_queries: MaxQueries = None,
    dry_run: DryRun = False,
    only: Only = None,
    jobs: Jobs = 1,
) -> None:
    """Train and score the variants of a table of the paper, and compare them with its figures.

    Variants that exist already are not trained again. A small model leaves most of a GPU idle, so
    running several jobs at once with `--jobs` saves time.

    Example: `lbr-ds reproduce table3 medical-demo --seeds 0,1 --jobs 2 --json table3.json`
    """
    from lbr_ds.reproduce import command

    if out is not None:
        check_writable(out)
    with writing(out or "the run folders"):
        text = command(
            table,
            recipe,
            overrides or [],
            seeds=seeds,
            nproc=nproc,
            max_queries=max_queries,
            dry_run=dry_run,
            only=only,
            jobs=jobs,
            out=out,
        )
    typer.echo(text)
