"""`lbr-ds merge`: a model between several models of one backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import MaxQueries
from lbr_ds.errors import ConfigError
from lbr_ds.system.failures import writing

Models = Annotated[list[Path], typer.Argument(help="Runs, checkpoints, exports or model folders.")]
Result = Annotated[Path, typer.Option(file_okay=False, help="A new folder for the result.")]
Weight = Annotated[
    float | None,
    typer.Option(
        help="Weight of the first model, from 0 to 1; the others share the rest equally. "
        "Default: equal weights."
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        help="linear (the weighted mean) or slerp (spherical interpolation of two models)."
    ),
]
Last = Annotated[
    int | None,
    typer.Option(min=2, help="Merge the newest N checkpoints of one run or stage instead."),
]
Weights = Annotated[
    str,
    typer.Option(
        help="Merge two models at several weights, such as 0,0.25,0.5,0.75,1, into subfolders "
        "of --out, and score each result on --data and --general."
    ),
]
Data = Annotated[str | None, typer.Option(help="With --weights: prepared data of the domain.")]
General = Annotated[
    str | None, typer.Option(help="With --weights: prepared data outside the domain.")
]


def merge(
    models: Models,
    out: Result,
    weight: Weight = None,
    method: MethodName = "linear",
    last: Last = None,
    weights: Weights = "",
    data: Data = None,
    general: General = None,
    max_queries: MaxQueries = None,
) -> None:
    """Merge the weights of models that were trained from one backbone.

    A domain model merged with its untrained backbone regains some of the ability outside the
    domain. The mean of the last checkpoints of a run is often better than each of them. The result
    can be exported like a checkpoint. `--weights` shows the scores in and outside the domain for
    several merge weights.

    Example: `lbr-ds merge runs/demo runs/demo/backbone --weight 0.7 --out models/between`
    """
    if weights:
        if weight is not None or last is not None:
            raise ConfigError("--weights takes two models; leave out --weight and --last")
        _trade(models, out, weights, data, general, method, max_queries)
        return
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


def _trade(
    models: list[Path],
    out: Path,
    weights: str,
    data: str | None,
    general: str | None,
    method: Any,
    max_queries: int | None,
) -> None:
    """Merge and score at each weight, and print the table."""
    from lbr_ds.cli.eval import check_start

    if data is None or general is None:
        raise ConfigError("--weights scores each model on two prepared folders: --data, --general")
    try:
        shares = [float(part) for part in weights.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {weights!r}: give numbers from 0 to 1, as 0,0.25,0.5,0.75,1"
        ) from None
    for model in models:
        check_start(str(model), data, general)
    from lbr_ds.evaluation import EvalOptions
    from lbr_ds.trade import NAME, trade

    options = EvalOptions(max_queries=max_queries)
    with writing(out):
        rows = trade(
            models, out, data=data, general=general, weights=shares, method=method, options=options
        )
    names = [Path(place).name for place in (data, general)]
    heads = (f"{name}\n{score}" for name in names for score in ("R@10", "N@10"))
    table = Table("\nweight", *heads, "\nmean N@10")
    for row in rows:
        sides = (row["domain"], row["general"])
        scores = [side[key] for side in sides for key in ("recall_at_10", "ndcg_at_10")]
        mean = sum(side["ndcg_at_10"] for side in sides) / 2
        table.add_row(f"{row['weight']:g}", *(f"{score:.4f}" for score in (*scores, mean)))
    Console().print(table)
    typer.echo(f"written to {out / NAME}; the models are beside it")
