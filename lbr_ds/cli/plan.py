"""`lbr-ds plan`: what a cluster must have, by arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.cli.app import JsonFile, Overrides, Recipe
from lbr_ds.system.failures import check_writable, writing

Nodes = Annotated[int, typer.Option(min=1, help="Number of nodes.")]
Gpus = Annotated[int, typer.Option(min=1, help="Number of GPUs per node.")]
GpuType = Annotated[
    str,
    typer.Option(
        help="Type of GPU: h100, h200, b200, ... (all are in lbr_ds/plan/gpus.yaml), or a YAML "
        "file with the same keys."
    ),
]
Network = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Bandwidth to other nodes in GB/s, per GPU and direction. Default: that of --gpu.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        help="The backbone's config.json, if the backbone is neither a local folder nor in the "
        "cache of the Hugging Face hub."
    ),
]
Passages = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="For mining: number of passages to encode and search. Default: that of the "
        "prepared data.",
    ),
]
Queries = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="For mining: number of queries. Default: that of the prepared data, or one per "
        "passage.",
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="For mining: number of tokens per encoded text. Default: model.max_length."
    ),
]


def plan(
    recipe: Recipe,
    nodes: Nodes,
    gpus: Gpus,
    overrides: Overrides = None,
    gpu: GpuType = "h100",
    network: Network = None,
    config: ConfigFile = None,
    passages: Passages = None,
    queries: Queries = None,
    tokens: Tokens = None,
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
