"""`lbr-ds reproduce`: the paper's tables with a recipe of yours."""

from __future__ import annotations

from typing import Annotated

import typer

from lbr_ds.cli.app import JsonFile, MaxQueries, Overrides, Recipe
from lbr_ds.system.failures import check_writable, writing


def reproduce(
    table: Annotated[
        str,
        typer.Argument(help="table1 to table6, figure3, counts, bottleneck, beyond or forgetting."),
    ],
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of training: 0,1,2; default: the recipe's.")
    ] = "",
    out: JsonFile = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks of each training.")] = None,
    max_queries: MaxQueries = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the jobs without running them.")
    ] = False,
    only: Annotated[int | None, typer.Option(help="Run only this job of the list.")] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Run so many jobs at once, on one device or spread over the GPUs. A job has one "
            "rank then, unless --nproc says otherwise.",
        ),
    ] = 1,
) -> None:
    """Reproduce a table of the paper: train what is missing, evaluate, print both side by side.

    A small model leaves most of a GPU idle, so several jobs on it take less time.

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
