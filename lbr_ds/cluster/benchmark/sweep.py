"""Run a sweep of configurations and store a row for each of them.

Whatever ends a configuration becomes a row with its reason, and the sweep continues. FOLDER gets

    result.json   settings, environment and rows, rewritten after every row: a sweep that was killed
                  is resumed at the first missing row
    RESULT.md     the table; result.png the plots
    rows/NAME.log what the ranks of a configuration printed; rows/NAME/ the log of each rank
"""

from __future__ import annotations

import glob
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_ds.cluster.benchmark.derive import derive
from lbr_ds.cluster.benchmark.processes import (
    exit_on_sigterm,
    failure_reason,
    rank_command,
    run_command,
)
from lbr_ds.config import RunConfig, load
from lbr_ds.errors import ConfigError
from lbr_ds.plan import find_gpu
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json, write_text
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.urls import is_url

log = logging.getLogger(__name__)
SCALINGS = ("weak", "strong")


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        recipe: a file, or a shipped name.
        stage: 1 or 2.
        ranks: numbers of ranks, one configuration for each.
        folder: where the rows are stored.
        overrides: of the recipe's keys.
        tokens: values of micro_batch_tokens; empty: the recipe's.
        layouts: ds_configs; empty: the recipe's.
        scaling: "weak" keeps the samples of a rank, "strong" those of a step; at the largest number
            of ranks both are the recipe's step.
        steps: timed steps of a configuration.
        launcher: a command that starts the ranks, with {nodes}, {ranks}, {per_node} (ranks on each
            node) and {log} (a prefix for files that the ranks may print into); empty: ranks of this
            machine.
        per_node: with a launcher, the ranks of a full node.
        gpu: as `plan --gpu`; empty: by the device's name.
    """

    recipe: str
    stage: int
    ranks: tuple[int, ...]
    folder: Path
    overrides: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    layouts: tuple[str, ...] = ()
    scaling: tuple[str, ...] = SCALINGS
    steps: int = 5
    launcher: str = ""
    per_node: int = 1
    gpu: str = ""

    def placement(self, ranks: int) -> tuple[int, int]:
        """Return (nodes, ranks on each).

        Raises:
            ConfigError: the ranks do not fill whole nodes.
        """
        if not self.launcher or ranks <= self.per_node:
            return 1, ranks
        if ranks % self.per_node:
            raise ConfigError(
                f"--ranks {ranks} does not fill nodes of --per-node {self.per_node}; "
                f"take a multiple of it, or fewer"
            )
        return ranks // self.per_node, self.per_node


@dataclass(frozen=True)
class Configuration:
    """One configuration of a sweep. kind: "training", or "network", which only has `ranks`."""

    kind: str
    ranks: int
    tokens: int | str = 0  # or auto
    ds_config: str = ""
    samples: int = 0

    @property
    def name(self) -> str:
        """A unique name, for people and for files."""
        if self.kind == "network":
            return f"network-{self.ranks}-ranks"
        layout = self.ds_config.removesuffix(".json").replace("/", "_")
        return f"{self.ranks}-ranks-{self.tokens}-tokens-{layout}-{self.samples}-samples"

    def overrides(self, stage: int) -> list[str]:
        """Return the recipe's keys that it sets. Stage 2 does not need the weights of stage 1."""
        keys = ["stage2.from=backbone"]
        if self.kind == "training":
            keys += [
                f"stage{stage}.samples_per_step={self.samples}",
                f"stage{stage}.micro_batch_tokens={self.tokens}",
                f"engine.ds_config={self.ds_config}",
            ]
        return keys


def configurations(sweep: Sweep, run: RunConfig) -> list[Configuration]:
    """Return all configurations, those with few ranks first, each once."""
    part = run.stage(sweep.stage)
    whole, share = part.samples_per_step, max(1, part.samples_per_step // max(sweep.ranks))
    wanted: list[Configuration] = []
    for ranks in sorted(sweep.ranks):
        if ranks > 1:
            wanted.append(Configuration("network", ranks))
        for layout in sweep.layouts or (run.engine.ds_config,):
            for tokens in sweep.tokens or (part.micro_batch_tokens,):
                for scaling in sweep.scaling:
                    samples = share * ranks if scaling == "weak" else whole
                    wanted.append(Configuration("training", ranks, tokens, layout, samples))
    return list(dict.fromkeys(wanted))


def run_sweep(sweep: Sweep, *, retry: bool = False) -> dict[str, Any]:
    """Measure every row that the folder does not have yet.

    Args:
        sweep: what to measure.
        retry: also repeat rows that failed.

    Returns:
        The content of result.json.

    Raises:
        ConfigError: a recipe that cannot be read, an unknown scaling or GPU, ranks that do not fill
            their nodes, or a folder with rows of other settings.
        EnvironmentProblem: more ranks than this machine can run.
    """
    run = load(sweep.recipe, sweep.overrides)
    _check(sweep)  # before the folder is made
    with lock_folder(sweep.folder, cure="wait until it has ended, or give another --out"):
        return _run_sweep(sweep, run, retry)


def _check(sweep: Sweep) -> None:
    from lbr_ds.training.launch import check_nproc

    for way in sweep.scaling:
        if way not in SCALINGS:
            raise ConfigError(f"--scaling {way}: use weak, strong or weak,strong")
    for ranks in sweep.ranks:
        sweep.placement(ranks)
        if not sweep.launcher:
            check_nproc(ranks)
    if sweep.gpu:
        find_gpu(sweep.gpu)


def _run_sweep(sweep: Sweep, run: RunConfig, retry: bool) -> dict[str, Any]:
    from lbr_ds.cluster.benchmark.plot import plot
    from lbr_ds.cluster.benchmark.table import markdown

    result = _open_result(sweep, run)
    if retry:
        result["rows"] = [row for row in result["rows"] if row["reason"] is None]
    wanted = configurations(sweep, run)
    done = {row["measure"] for row in result["rows"]}
    todo = [one for one in wanted if one.name not in done]
    if done:
        present = len(wanted) - len(todo)
        log.info("%d of %d rows are in %s already", present, len(wanted), sweep.folder)
    with exit_on_sigterm():
        for number, one in enumerate(todo, 1):
            log.info("%d/%d %s ...", number, len(todo), one.name)
            row = _measure(one, sweep, run)
            log.info("    %s", row["reason"] or f"{row['value']:.4g} {row['unit']}")
            result["rows"].append(row)
            write_json(sweep.folder / "result.json", derive(result, sweep, run))
    derive(result, sweep, run)
    write_text(sweep.folder / "RESULT.md", markdown(result))
    plot(result, sweep.folder / "result.png")
    return result


def _open_result(sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """Return the folder's result, or a new one. Raises ConfigError if it has other settings."""
    settings = _settings(sweep, run)
    (sweep.folder / "rows").mkdir(parents=True, exist_ok=True)
    path = sweep.folder / "result.json"
    if path.is_file():
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if (was := stored["settings"].get(key)) != value:
                raise ConfigError(
                    f"{path} holds rows of other settings ({key}: {was!r}, now {value!r}); "
                    "give another --out, or remove it"
                )
        return stored
    facts = environment.describe()
    return {"suite": "cluster", "environment": facts, "settings": settings, "rows": []}


def _settings(sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """Return what all rows of a folder have in common, by dotted key."""
    nested = {
        "recipe": run.name,
        "steps": sweep.steps,
        "stage": sweep.stage,
        "data": {"folder": mask_secrets(str(run.data.folder)), "workers": run.data.workers},
        f"stage{sweep.stage}": run.stage(sweep.stage).model_dump(exclude={"micro_batch_tokens"}),
        **run.model_dump(include={"model", "bottleneck"}),
    }

    def flat(value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {key: value}
        parts = [flat(inner, f"{key}.{name}" if key else name) for name, inner in value.items()]
        return {name: inner for part in parts for name, inner in part.items()}

    settings: dict[str, Any] = json.loads(json.dumps(flat(nested, "")))
    return settings


def _measure(one: Configuration, sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """Run a configuration to its end and return its row."""
    file = sweep.folder / "rows" / f"{one.name}.json"
    file.unlink(missing_ok=True)
    for old in _logs(file):
        old.unlink()
    nodes, per_node = sweep.placement(one.ranks)
    log_prefix = file.with_suffix("")
    fills = {"nodes": nodes, "ranks": one.ranks, "per_node": per_node, "log": log_prefix}
    words = rank_command(_arguments(one, sweep, run, file), one.ranks, sweep.launcher, fills)
    code = run_command(words, file.with_suffix(".log"))
    figures, reason = None, None
    if code == 0 and file.is_file():
        figures = json.loads(file.read_text(encoding="utf-8"))
    else:
        printed = [path.read_text(encoding="utf-8", errors="replace") for path in _logs(file)]
        reason = failure_reason("\n".join(printed), code)
    value, unit = None, "tokens/s per rank" if one.kind == "training" else "GB/s"
    if figures is not None and one.kind == "training":
        value = figures["tokens_per_second_per_rank"]
    elif figures is not None:
        value = figures["collectives"][-2]["gb_per_second"]
    return {
        "measure": one.name,
        "value": value,
        "unit": unit,
        "goal": None,
        "better": "higher",
        "floor": None,
        "kind": one.kind,
        "ranks": one.ranks,
        "nodes": nodes,
        "per_node": per_node,
        "micro_batch_tokens": one.tokens,
        "ds_config": one.ds_config,
        "samples": one.samples,
        "reason": reason,
        "figures": figures,
    }


def _arguments(one: Configuration, sweep: Sweep, run: RunConfig, file: Path) -> list[str]:
    """Return the arguments of lbr-ds for a configuration; rank 0 writes `file`."""
    keys = [*sweep.overrides, *one.overrides(sweep.stage)]
    folder = run.data.folder
    if not is_url(folder) and not (Path(folder) / "manifest.json").is_file():
        # Random weights must not become the backbone of the recipe's run.
        keys.append(f"run={sweep.folder / 'random'}")
    words = ["bench", "cluster", sweep.recipe, *keys, "--stage", str(sweep.stage)]
    words += ["--steps", str(sweep.steps), "--row", str(file)]
    return [*words, "--network"] if one.kind == "network" else words


def _logs(file: Path) -> list[Path]:
    """Return the files that the launcher and the ranks of a configuration printed into."""
    return sorted(file.parent.glob(f"{glob.escape(file.stem)}.*log"))


def default_ranks() -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to this machine's GPUs; without a GPU up to its cores, at most 4."""
    import torch

    most = torch.cuda.device_count() or min(4, os.cpu_count() or 1)
    doubled = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return tuple(dict.fromkeys([*doubled, most]))
