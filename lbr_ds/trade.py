"""Score models between two models of one backbone, on their domain and outside it.

    trade(["runs/medical", "runs/general"], Path("trade"), data="data/medical", general="data/wiki")

Training for a domain costs ability elsewhere, and a merge (`merging.py`) gives part of it back. How
much of either side a weight keeps is an empirical question: each weight is merged and scored by
`eval` on both prepared folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_ds.errors import ConfigError
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.merging import Method, merge
from lbr_ds.system.atomic import write_json

NAME = "trade.json"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_DEFAULTS = EvalOptions()


def trade(
    models: Sequence[Path],
    out: Path,
    *,
    data: Path | str,
    general: Path | str,
    weights: Sequence[float] = WEIGHTS,
    method: Method = "linear",
    options: EvalOptions = _DEFAULTS,
) -> list[dict[str, Any]]:
    """Merge two models at several weights and score each on two prepared folders.

    Args:
        models: The domain model and the other one, as `merge` takes them.
        out: A folder for the merged models (`weight-0.25`, ...) and `trade.json`, which is written
            after each weight. Weights 0 and 1 are the models themselves.
        data: Prepared data of the domain.
        general: Prepared data outside it.
        weights: Shares of the first model, each from 0 to 1.
        method: See `merge`.
        options: See `evaluate`.

    Returns:
        A row for each weight, in rising order: {"weight", "model", "domain", "general"}, the last
        two as `evaluate` returns the scores of a task.

    Raises:
        ConfigError: The models or the arguments do not fit together.
    """
    if len(models) != 2 or not weights or not all(0 <= weight <= 1 for weight in weights):
        raise ConfigError("give two models, and weights of the first one from 0 to 1")
    rows: list[dict[str, Any]] = []
    for weight in sorted(set(weights)):
        if weight in (0, 1):
            place = models[0] if weight else models[1]
        else:
            place = out / f"weight-{weight:g}"
            merge(models, place, weight=weight, method=method)
        result = evaluate(str(place), data=data, general=general, options=options)
        # The first task of each folder: `control` of the knowledge protocol would follow it.
        tasks = result["tasks"]
        sides = {name.rpartition("-")[0]: tasks[name] for name in tasks if name.endswith("-eval")}
        domain, other = sides.values()
        rows.append({"weight": weight, "model": str(place), "domain": domain, "general": other})
        write_json(
            out / NAME,
            {"models": [str(model) for model in models], "method": method, "rows": rows}
            | {key: result[key] for key in ("data", "general", "max_queries", "environment")},
        )
    return rows
