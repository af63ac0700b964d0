"""Score models between two models of one backbone, on their domain and outside it.

    trade(["runs/medical", "runs/general"], Path("trade"), data="data/medical", general="data/wiki")

Training for a domain costs ability elsewhere, and a merge (`merging.py`) gives part of it back. How
much of either side a weight keeps is an empirical question: each weight is merged and scored by
`eval` on both prepared folders.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lbr_ds
from lbr_ds import runs
from lbr_ds.encoder import folder_hash
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.evaluation.judgements import manifest_of
from lbr_ds.merging import Method, merge
from lbr_ds.system.atomic import write_json
from lbr_ds.system.yaml_json import read_json

log = logging.getLogger(__name__)
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
            after each weight. Weights 0 and 1 are the models themselves. Merged models and scores
            that an earlier call with equal models, data, method and options has stored are used.
        data: Prepared data of the domain.
        general: Prepared data outside it.
        weights: Shares of the first model, each from 0 to 1.
        method: See `merge`.
        options: See `evaluate`.

    Returns:
        A row for each weight, in rising order: {"weight", "model", "domain", "general"}, the last
        two as `evaluate` returns the scores of a task.

    Raises:
        ConfigError: The models or the arguments do not fit together, or `out` has merged models of
            other models or of another method.
        CheckpointError: A model is damaged.
        DataError: The data is missing, or `trade.json` is damaged.
    """
    if len(models) != 2 or not weights or not all(0 <= weight <= 1 for weight in weights):
        raise ConfigError("give two models, and weights of the first one from 0 to 1")
    folders = [runs.model_folder(model) for model in models]  # training may save others meanwhile
    chosen = sorted(set(weights))
    fingerprint = _fingerprint(folders, (data, general), method, options)
    rows = _stored(out / NAME, fingerprint)
    places: dict[float, Path] = {0: folders[1], 1: folders[0]}
    for weight in chosen:
        if weight not in rows and weight not in places:
            places[weight] = out / f"weight-{weight:g}"
            merge(folders, places[weight], weight=weight, method=method)
    for weight in (weight for weight in chosen if weight not in rows):
        place = str(places[weight])
        result = evaluate(place, data=data, general=general, options=options)
        domain, other = _sides(result["tasks"])
        rows[weight] = {"weight": weight, "model": place, "domain": domain, "general": other}
        write_json(
            out / NAME,
            {
                "fingerprint": fingerprint,
                "models": [str(model) for model in models],
                "method": method,
                "rows": [rows[known] for known in sorted(rows)],
            }
            | {key: result[key] for key in ("data", "general", "max_queries", "environment")},
        )
    return [rows[weight] for weight in chosen]


def _sides(tasks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores of the domain and of the other data, without `control` of either."""
    return [scores for name, scores in tasks.items() if name.endswith("-eval")]


def _fingerprint(
    folders: Sequence[Path], data: Sequence[Path | str], method: Method, options: EvalOptions
) -> str:
    """Return a hash of all that decides the scores of a weight."""
    plain = [
        lbr_ds.__version__,
        [folder_hash(folder) for folder in folders],
        [manifest_of(place).fingerprint for place in data],
        method,
        asdict(options),
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _stored(path: Path, fingerprint: str) -> dict[float, dict[str, Any]]:
    """Return {weight: row} of the scores in a file; {} if they are of other models or data."""
    if not path.exists():
        return {}
    found = read_json(
        path, "a result of `lbr-ds merge --weights`", DataError, "remove it", strict=False
    )
    if found.get("fingerprint") != fingerprint:
        log.info("%s is of other models, data or options; its weights are scored again", path)
        return {}
    return {row["weight"]: row for row in found["rows"]}
