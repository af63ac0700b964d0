"""`lbr-ds merge`: a model between several models of one backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lbr_ds.errors import ConfigError
from lbr_ds.system.failures import writing


def merge(
    models: Annotated[
        list[Path], typer.Argument(help="Runs, checkpoints, exports or model folders.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="A new folder.")],
    weight: Annotated[
        float | None,
        typer.Option(help="Share of the first model, 0 to 1; default: all models alike."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear (the mean) or slerp (along the arc; two models).")
    ] = "linear",
    last: Annotated[
        int | None, typer.Option(min=2, help="Merge the newest N checkpoints of one run instead.")
    ] = None,
) -> None:
    """Merge the weights of models that were trained from one backbone.

    Between a domain model and its untrained backbone lies a model that keeps general ability; the
    mean of the last checkpoints of a run is often better than each. Export the result like a
    checkpoint, and compare with `lbr-ds eval`.

    Example: `lbr-ds merge runs/demo runs/demo/backbone --weight 0.7 --out models/between`
    """
    from lbr_ds.merging import last_checkpoints
    from lbr_ds.merging import merge as merge_models

    if last is not None:
        if len(models) != 1:
            raise ConfigError(f"--last {last} takes one run or stage, {len(models)} folders given")
        models = last_checkpoints(models[0], last)
    chosen: Any = method
    with writing(out):
        merged = merge_models(models, out, weight=weight, method=chosen)
    typer.echo(f"{out}: merged from {', '.join(map(str, merged))}")
