"""`lbr-ds train`: one stage of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lbr_ds.cli.app import Overrides, Recipe, Stage
from lbr_ds.errors import SAVED_AND_STOPPED
from lbr_ds.system.failures import check_writable
from lbr_ds.system.imports import without_collector

if TYPE_CHECKING:
    from lbr_ds.config import RunConfig


def train(
    recipe: Recipe,
    stage: Stage,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ranks on this machine. Default: one per GPU."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Resume even if the recipe or the data has changed."),
    ] = False,
) -> None:
    """Train one stage, resuming from the newest checkpoint of the run folder.

    Stage 2 starts from the checkpoint of stage 1 with the best held-out score, unless the key
    stage2.from names another one.

    Example: `lbr-ds train demo --stage 1 --nproc 2 stage1.num_steps=50`
    """
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    check_start(run, stage, nproc)
    with without_collector():
        from lbr_ds.training.launch import launch_training, ranks_to_start

    count = ranks_to_start(nproc, run.stage(stage).samples_per_step)
    if count > 1:
        code = launch_training(recipe, stage, count, overrides=overrides or [], force=force)
        raise typer.Exit(code)
    with without_collector():
        from lbr_ds.distributed import leave
        from lbr_ds.training.loop import train as train_stage

    complete = train_stage(run, stage, force=force)
    leave()
    if not complete:
        raise typer.Exit(SAVED_AND_STOPPED)


def check_start(run: RunConfig, stage: int, nproc: int | None) -> None:
    """Check what can be checked before torch is imported, which takes seconds.

    Raises:
        ConfigError: the ds_config is wrong, or `nproc` does not divide the samples of a step.
        DataError: the data folder is not prepared, or lacks the split of the stage.
        EnvironmentProblem: the run folder cannot be written.
        CheckpointError: there is nothing that stage 2 can start from.
    """
    from lbr_ds import runs
    from lbr_ds.config import STAGES, ds_config
    from lbr_ds.config.training import check_world
    from lbr_ds.shards import Manifest

    if run.engine.ds_config != "auto":
        ds_config.load(run.engine.ds_config)
    manifest = Manifest.load(run.data.folder, run.data.cache_gib)
    for part in run.parts(stage):
        if nproc is not None:
            check_world(run.stage(part).samples_per_step, nproc)
        manifest.records(STAGES[part].split)
    check_writable(run.run / "recipe.yaml")
    if stage == 2:
        runs.check_start(run.run, run.stage2.start_from)
