"""Suite `cluster`: what a cluster makes of a recipe, by ranks, micro-batch and ds_config.

    result = run_sweep(Sweep("my.yaml", stage=1, ranks=(8, 16, 32), folder=Path("bench-32")))

The driver runs once, where the job's batch script runs, and starts each configuration as processes
of their own: ranks of this machine, or by a launcher's command (`srun`). Whatever ends those, the
driver notes as a row and goes on. FOLDER gets

    result.json   settings, environment and rows, rewritten after every row: a sweep that is killed
                  goes on at the first row that is missing
    RESULT.md     the table; result.png the picture
    rows/NAME.log what a configuration's ranks printed; rows/NAME/ each rank's own log

rank.py is what a rank does, traffic.py what collectives cost, table.py and draw.py print.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_ds.cluster.benchmark.derive import derive
from lbr_ds.cluster.plan import find_gpu
from lbr_ds.config import RunConfig, load
from lbr_ds.errors import ConfigError
from lbr_ds.system import children, environment
from lbr_ds.system.atomic import write_json, write_text
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.urls import is_url, mask_secrets

log = logging.getLogger(__name__)
SCALINGS = ("weak", "strong")
_GRACE_SECONDS = 30  # for a configuration to end when the sweep is told to


@dataclass(frozen=True)
class Sweep:
    """What to measure. Empty `tokens` and `layouts`: what the recipe says.

    ranks: how many take part, one number a configuration. scaling: "weak" keeps a rank's samples,
    "strong" the step's; both are the recipe's step at the largest number of ranks. launcher: words
    before the program's, with {nodes}, {ranks}, {per_node} (ranks on each node) and {log}, how the
    names of files begin that the ranks may print into; empty: ranks of this machine.
    gpu: as `plan --gpu`; empty: told by the device's name.
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

    def placed(self, ranks: int) -> tuple[int, int]:
        """(nodes, ranks on each). Raises ConfigError when they are not alike."""
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
    """One row to be. kind: "training", or "network" with nothing but `ranks`."""

    kind: str
    ranks: int
    tokens: int = 0
    ds_config: str = ""
    samples: int = 0

    @property
    def name(self) -> str:
        """What tells it from all others, for people and as a file's name."""
        if self.kind == "network":
            return f"network-{self.ranks}-ranks"
        layout = self.ds_config.removesuffix(".json").replace("/", "_")
        return f"{self.ranks}-ranks-{self.tokens}-tokens-{layout}-{self.samples}-samples"

    def overrides(self, stage: int) -> list[str]:
        """The recipe's keys that it sets. Weights and data of stage 1 are not asked for."""
        keys = ["stage2.from=backbone"]
        if self.kind == "training":
            keys += [
                f"stage{stage}.samples_per_step={self.samples}",
                f"stage{stage}.micro_batch_tokens={self.tokens}",
                f"engine.ds_config={self.ds_config}",
            ]
        return keys


def configurations(sweep: Sweep, run: RunConfig) -> list[Configuration]:
    """All of them, few ranks first, each once."""
    part = run.stage(sweep.stage)
    whole, share = part.samples_per_step, max(1, part.samples_per_step // max(sweep.ranks))
    found: list[Configuration] = []
    for ranks in sorted(sweep.ranks):
        if ranks > 1:
            found.append(Configuration("network", ranks))
        for layout in sweep.layouts or (run.engine.ds_config,):
            for tokens in sweep.tokens or (part.micro_batch_tokens,):
                for scaling in sweep.scaling:
                    samples = share * ranks if scaling == "weak" else whole
                    found.append(Configuration("training", ranks, tokens, layout, samples))
    return list(dict.fromkeys(found))


def run_sweep(sweep: Sweep, *, retry: bool = False) -> dict[str, Any]:
    """Every row that FOLDER does not have yet; retry: also those that failed. JSON-ready.

    Raises ConfigError for a recipe that cannot be read, a scaling or GPU that is none, ranks that
    do not fill their nodes, and a folder that holds rows of other settings, and EnvironmentProblem
    for more ranks than this machine can run.
    """
    run = load(sweep.recipe, sweep.overrides)
    _check(sweep)  # before the folder is made
    with lock_folder(
        sweep.folder, cure="wait until it has ended, or give another folder with --out"
    ):
        return _run_sweep(sweep, run, retry)


def _check(sweep: Sweep) -> None:
    from lbr_ds.train.launch import check_nproc

    for way in sweep.scaling:
        if way not in SCALINGS:
            raise ConfigError(f"--scaling {way}: say weak, strong or weak,strong")
    for ranks in sweep.ranks:
        sweep.placed(ranks)
        if not sweep.launcher:
            check_nproc(ranks)
    if sweep.gpu:
        find_gpu(sweep.gpu)


def _run_sweep(sweep: Sweep, run: RunConfig, retry: bool) -> dict[str, Any]:
    from lbr_ds.cluster.benchmark.plot import draw
    from lbr_ds.cluster.benchmark.table import markdown

    result = _opened(sweep, run)
    if retry:
        result["rows"] = [row for row in result["rows"] if row["reason"] is None]
    wanted = configurations(sweep, run)
    done = {row["measure"] for row in result["rows"]}
    todo = [one for one in wanted if one.name not in done]
    if done:
        log.info(
            "%d of %d rows stand in %s already", len(wanted) - len(todo), len(wanted), sweep.folder
        )
    with _ending():
        for number, one in enumerate(todo, 1):
            log.info("%d/%d %s ...", number, len(todo), one.name)
            row = _row(one, sweep, run)
            log.info("    %s", row["reason"] or f"{row['value']:.4g} {row['unit']}")
            result["rows"].append(row)
            write_json(sweep.folder / "result.json", derive(result, sweep, run))
    derive(result, sweep, run)
    write_text(sweep.folder / "RESULT.md", markdown(result))
    draw(result, sweep.folder / "result.png")
    return result


def _opened(sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """What FOLDER holds, or a new result. Raises ConfigError when it is of other settings."""
    settings = _settings(sweep, run)
    (sweep.folder / "rows").mkdir(parents=True, exist_ok=True)
    path = sweep.folder / "result.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, value in settings.items():
            if (was := found["settings"].get(key)) != value:
                raise ConfigError(
                    f"{path} holds rows of other settings ({key}: {was!r}, now {value!r}); "
                    "give another --out, or remove it"
                )
        return found
    facts = environment.describe()
    return {"suite": "cluster", "environment": facts, "settings": settings, "rows": []}


def _settings(sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """What rows of one folder have in common: dotted key -> value."""
    told = {
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

    settings: dict[str, Any] = json.loads(json.dumps(flat(told, "")))
    return settings


def _row(one: Configuration, sweep: Sweep, run: RunConfig) -> dict[str, Any]:
    """Start a configuration, see it through, and say how it went."""
    file = sweep.folder / "rows" / f"{one.name}.json"
    file.unlink(missing_ok=True)
    for old in _printed(file):
        old.unlink()
    code = _see_through(command(one, sweep, run, file), file.with_suffix(".log"))
    figures, reason = None, None
    if code == 0 and file.is_file():
        figures = json.loads(file.read_text(encoding="utf-8"))
    else:
        printed = [log.read_text(encoding="utf-8", errors="replace") for log in _printed(file)]
        reason = why("\n".join(printed), code)
    value, unit = None, "tokens/s a rank" if one.kind == "training" else "GB/s"
    if figures is not None and one.kind == "training":
        value = figures["tokens_per_second_per_rank"]
    elif figures is not None:
        value = figures["collectives"][-2]["gb_per_second"]
    nodes, per_node = sweep.placed(one.ranks)
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


def command(one: Configuration, sweep: Sweep, run: RunConfig, file: Path) -> list[str]:
    """The words that start a configuration's ranks; rank 0 writes `file`."""
    keys = [*sweep.overrides, *one.overrides(sweep.stage)]
    folder = run.data.folder
    if not is_url(folder) and not (Path(folder) / "manifest.json").is_file():
        keys.append(f"run={sweep.folder / 'random'}")  # random weights are no run's backbone
    words = [
        "bench",
        "cluster",
        sweep.recipe,
        *keys,
        "--stage",
        str(sweep.stage),
        "--steps",
        str(sweep.steps),
        "--row",
        str(file),
    ]
    words += ["--network"] * (one.kind == "network")
    if not sweep.launcher:
        return [sys.executable, "-m", "lbr_ds", *words, "--nproc", str(one.ranks)]
    nodes, per_node = sweep.placed(one.ranks)
    launcher = shlex.split(sweep.launcher)
    fills = {"nodes": nodes, "ranks": one.ranks, "per_node": per_node, "log": file.with_suffix("")}
    for name, value in fills.items():
        launcher = [word.replace(f"{{{name}}}", str(value)) for word in launcher]
    return [*launcher, *words]


def _printed(file: Path) -> list[Path]:
    """What the launcher and the ranks of a configuration printed into."""
    return sorted(file.parent.glob(f"{glob.escape(file.stem)}.*log"))


def _see_through(words: list[str], output: Path) -> int:
    """The exit code of a command that prints into `output`; it does not outlive this call."""
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--launcher: {words[0]} cannot be started: no such program is found")
    if words[0] != sys.executable:
        words = children.following_command(words)
    with output.open("wb") as file:
        child = subprocess.Popen(
            words,
            env=children.environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()


@contextmanager
def _ending() -> Iterator[None]:
    """TERM ends the sweep as Ctrl-C does, by way of `finally`."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_MEMORY = re.compile(
    r"out ?of ?memory|can't allocate memory|Cannot allocate memory|oom.kill|MemoryError",
    re.IGNORECASE,
)
_ERROR = re.compile(r"(\S+: )?[\w.]*(Error|Exception)\b.*")


def why(printed: str, code: int) -> str:
    """The line of what a configuration's ranks printed that says why it failed."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    told = [line.split("lbr-ds: error: ", 1)[1] for line in lines if "lbr-ds: error: " in line]
    told = [line for line in told if not line.startswith("another rank ended")]
    raised = [line for line in lines if _ERROR.match(line)]
    for line in lines:
        if _MEMORY.search(line):
            return f"out of memory: {line[:200]}"
    found = next(iter([*told, *raised]), lines[-1] if lines else "nothing was printed")
    return f"{found[:300]} (exit code {code})"


def default_ranks() -> tuple[int, ...]:
    """1, 2, 4, ... up to this machine's GPUs; without a GPU up to its cores, at most 4."""
    import torch

    most = torch.cuda.device_count() or min(4, os.cpu_count() or 1)
    doubled = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    return tuple(dict.fromkeys([*doubled, most]))
