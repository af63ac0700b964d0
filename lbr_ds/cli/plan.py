"""`lbr-ds plan`: what a cluster must have, by arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.cli.app import JsonFile, Overrides, Recipe
from lbr_ds.system.failures import check_writable, writing


def plan(
    recipe: Recipe,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs per node.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="Type of GPU: h100, h200, b200, ... (all are in lbr_ds/plan/gpus.yaml), or a YAML "
            "file with the same keys."
        ),
    ] = "h100",
    network: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Bandwidth to other nodes in GB/s, per GPU and direction. Default: that of --gpu.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The backbone's config.json, if the backbone is neither a local folder nor in the "
            "cache of the Hugging Face hub."
        ),
    ] = None,
    passages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For mining: number of passages to encode and search. Default: that of the "
            "prepared data.",
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For mining: number of queries. Default: that of the prepared data, or one per "
            "passage.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="For mining: number of tokens per encoded text. Default: model.max_length."
        ),
    ] = None,
    out: JsonFile = None,
) -> None:
    """Estimate memory, traffic and time of both stages and of mining, without a GPU.

    Example: `lbr-ds plan huatuo-7b --nodes 4 --gpus 8 --gpu h100`
    """
    from lbr_ds.config import load
    from lbr_ds.plan import Cluster, find_gpu, make_plan
    from lbr_ds.plan.table import show_plan, write

    run = load(recipe, overrides or [])
    if out is not None:
        check_writable(out)
    result = make_plan(
        run,
        Cluster(nodes, gpus, find_gpu(gpu, network)),
        config,
        passages=passages,
        queries=queries,
        tokens=tokens,
    )
    show_plan(result, recipe)
    with writing(out or "standard output"):
        write(result, out)
