"""`lbr-ds doctor`: check a node before a run."""

from __future__ import annotations

from typing import Annotated

import typer

from lbr_ds.cli.app import Overrides, Recipe, Stage
from lbr_ds.system.imports import without_collector


def doctor(
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Stage = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes of the run.")] = 1,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ranks on each node. Default: one per GPU."),
    ] = None,
) -> None:
    """Check that this node is ready for a run: data, disk, memory, GPUs.

    All faults are reported in one line, each with what to do about it. SLURM jobs of this project
    run the check on each node before training.

    Example: `lbr-ds doctor demo --stage 1 --nproc 2`
    """
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    with without_collector():
        import torch

        from lbr_ds.cluster.doctor import NodeTask, check_node

    ranks = nproc or max(1, torch.cuda.device_count())
    typer.echo(check_node(NodeTask(run, stage, nodes, ranks)))
