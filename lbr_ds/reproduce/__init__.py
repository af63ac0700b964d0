"""A table of the paper and a recipe -> its runs, and their scores beside the paper's figures.

    reproduce("table3", "medical-demo", seeds=[0, 1, 2])

1. `tables.py`: the table as a list of variants.
2. `jobs.py`: the folders that these need, below ROOT = RUN/reproduce.
3. What is missing is trained, one after another, each as `lbr-ds train` in a process of its own;
   then what is not scored is scored.
4. `result.py`, `draw.py`: ROOT/TABLE/{RESULT.md, result.json, result.png}.

Given again it goes on: what stands is not done twice, by whichever table it was done.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lbr_ds.config import RunConfig, load
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.reproduce.jobs import Job, Source, in_order, jobs_of, link
from lbr_ds.reproduce.paper import PAPER
from lbr_ds.reproduce.plot import draw
from lbr_ds.reproduce.results import Row, collect, render
from lbr_ds.reproduce.tables import TABLES, Table
from lbr_ds.shards import Manifest
from lbr_ds.system.atomic import write_json, write_text
from lbr_ds.system.children import run_verb
from lbr_ds.system.locks import lock_folder

__all__ = ["PAPER", "TABLES", "command", "list_jobs", "reproduce"]

log = logging.getLogger(__name__)


def reproduce(
    name: str,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    nproc: int | None = None,
    max_queries: int | None = None,
    only: int | None = None,
) -> dict[str, Any] | None:
    """Train and score what table `name` lacks; returns the result, written below RUN/reproduce too.

    seeds: of training (the data stays the recipe's); none: the recipe's own. nproc: ranks of a
    training. max_queries: a seeded sample of the held-out queries. only: do the job of that number
    in `list_jobs` alone, for job arrays, and return None.
    Raises ConfigError for an unknown table or job, what `check_nproc` raises, and LbrError when a
    training fails or is stopped.
    """
    run, table = _open(name, recipe, overrides)
    if nproc is not None:
        from lbr_ds.train.launch import check_nproc

        check_nproc(nproc, [run.stage(number).samples_per_step for number in (1, 2)])
    folder = _root(run) / name
    # Jobs of an array work side by side; the lock of a run folder keeps each to itself.
    mine = lock_folder(folder, cure="wait until it has ended") if only is None else nullcontext()
    with mine:
        result = _reproduce(folder, table, recipe, overrides, run, seeds, nproc, max_queries, only)
    return result


def _reproduce(
    folder: Path,
    table: Table,
    recipe: str,
    overrides: Sequence[str],
    run: RunConfig,
    seeds: Sequence[int],
    nproc: int | None,
    max_queries: int | None,
    only: int | None,
) -> dict[str, Any] | None:
    """`reproduce`, with the result in `folder`."""
    name = folder.name
    _prepare(recipe, overrides, table, run)
    rows, jobs = _plan(table, recipe, overrides, run, seeds)
    if only is not None:
        if not 0 <= only < len(jobs):
            raise ConfigError(f"--only {only}: {name} has jobs 0 to {len(jobs) - 1}")
        jobs = [jobs[only]]
    missing = [job for job in jobs if not job.trained()]
    for number, job in enumerate(missing, 1):
        log.info("== training %d of %d: %s", number, len(missing), job.folder.name)
        _train(job, nproc)
    notes = [note for job in jobs if (note := _score(job, max_queries, table.generation))]
    if only is not None:
        return None
    result = collect(name, table, rows, run, folder.parent, notes)
    result["folder"] = str(folder)
    result["command"] = shlex.join(
        ["lbr-ds", *_command(name, recipe, overrides, seeds, max_queries)]
    )
    draw(result, table, folder / "result.png")
    write_text(folder / "RESULT.md", render(result, table))
    write_json(folder / "result.json", result)
    return result


def list_jobs(
    name: str,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    nproc: int | None = None,
    max_queries: int | None = None,
) -> list[str]:
    """What `reproduce` would do, a line a job: its number, its phase, what is missing of it.

    Touches nothing. Jobs of one phase need only those of phases before. Before the data is
    prepared the folders' names are not the final ones.
    """
    run, table = _open(name, recipe, overrides)
    _, jobs = _plan(table, recipe, overrides, run, seeds)
    lines = [f"# lbr-ds {shlex.join(words)}" for words in _preparations(recipe, overrides, table)]
    for number, job in enumerate(jobs):
        todo = []
        if not _stands(job):
            train = shlex.join(job.train_command(nproc))
            todo.append(f"lbr-ds {train}" if job.phase else f"make {job.folder / 'backbone'}")
        if not job.scored(max_queries, table.generation):
            todo.append(f"lbr-ds {shlex.join(job.eval_command(max_queries, table.generation))}")
        lines.append(f"{number} phase {job.phase}: {' && '.join(todo) or 'done'}")
    return lines


def command(
    name: str,
    recipe: str,
    overrides: Sequence[str],
    *,
    seeds: str,
    nproc: int | None,
    max_queries: int | None,
    dry_run: bool,
    only: int | None,
    out: Path | None,
) -> str:
    """`lbr-ds reproduce`: the text it prints. seeds: "0,1,2"; out: also the result as JSON."""
    try:
        numbers = [int(seed) for seed in seeds.split(",") if seed]
    except ValueError:
        raise ConfigError(f"--seeds {seeds}: give whole numbers with commas: 0,1,2") from None
    if dry_run:
        lines = list_jobs(
            name, recipe, overrides, seeds=numbers, nproc=nproc, max_queries=max_queries
        )
        return "\n".join(lines)
    result = reproduce(
        name, recipe, overrides, seeds=numbers, nproc=nproc, max_queries=max_queries, only=only
    )
    if result is None:
        return f"job {only} of {name} is done"
    if out is not None:
        write_json(out, result)
    text = Path(result["folder"], "RESULT.md").read_text(encoding="utf-8")
    return f"{text}\nwritten to {result['folder']}{f' and {out}' if out else ''}"


def _open(name: str, recipe: str, overrides: Sequence[str]) -> tuple[RunConfig, Table]:
    if name not in TABLES:
        raise ConfigError(f"unknown table {name!r}; one of {', '.join(TABLES)}")
    run = load(recipe, list(overrides))
    return run, TABLES[name](run)


def _root(run: RunConfig) -> Path:
    return run.run / "reproduce"


def _plan(
    table: Table, recipe: str, overrides: Sequence[str], run: RunConfig, seeds: Sequence[int]
) -> tuple[list[Row], list[Job]]:
    source = Source(recipe, tuple(overrides), _root(run))
    rows = []
    for variant in table.variants:
        for seed in [None] if variant.model else seeds or [run.seed]:
            rows.append(Row(variant, seed, jobs_of(variant, seed or 0, source)))
    return rows, in_order([row.jobs for row in rows])


def _preparations(recipe: str, overrides: Sequence[str], table: Table) -> list[list[str]]:
    """The `prepare` commands of the data that is not there yet."""
    commands = []
    for more in dict.fromkeys(variant.data for variant in table.variants):
        data = load(recipe, [*overrides, *more]).data
        if isinstance(data.folder, Path) and not (data.folder / "manifest.json").is_file():
            commands.append(["prepare", recipe, *overrides, *more])
    return commands


def _prepare(recipe: str, overrides: Sequence[str], table: Table, run: RunConfig) -> None:
    """Make missing data. Raises DataError when two variants would be judged on different texts."""
    for words in _preparations(recipe, overrides, table):
        run_verb(*words)
    judged = {}
    for more in dict.fromkeys(variant.data for variant in table.variants):
        folder = load(recipe, [*overrides, *more]).data.folder
        judged[tuple(s.sha256 for s in Manifest.load(folder).shards("eval"))] = folder
    if len(judged) > 1:
        told = " and ".join(map(str, judged.values()))
        raise DataError(f"{told} hold different eval splits; remove them to prepare them again")


def _stands(job: Job) -> bool:
    try:
        return job.trained()
    except DataError:  # no data yet
        return False


def _train(job: Job, nproc: int | None) -> None:
    link(job)
    if job.phase:
        run_verb(*job.train_command(nproc))
        return
    from lbr_ds.model.bottleneck import prepare_backbone

    prepare_backbone(job.run.model, job.run.bottleneck, job.folder / "backbone", job.run.seed)


def _score(job: Job, max_queries: int | None, generation: bool) -> str:
    """Score a job's model if that is not done. Returns why not, for another's model, else ""."""
    if job.scored(max_queries, generation):
        return ""
    from lbr_ds.evaluate import EvalOptions, evaluate

    log.info("== scoring %s", job.folder.name)
    try:
        evaluate(
            job.scored_model,
            data=job.run.data.folder,
            output=job.scores,
            options=EvalOptions(max_queries=max_queries, generation=generation and not job.model),
        )
    except (ConfigError, EnvironmentProblem) as error:
        if not job.model:
            raise
        command = shlex.join(["lbr-ds", *job.eval_command(max_queries, generation)])
        return f"{job.model} is left out: {error}. To add it: `{command}`, then this again."
    return ""


def _command(
    name: str, recipe: str, overrides: Sequence[str], seeds: Sequence[int], max_queries: int | None
) -> list[str]:
    words = ["reproduce", name, recipe, *overrides]
    words += ["--seeds", ",".join(map(str, seeds))] if seeds else []
    return words + (["--max-queries", str(max_queries)] if max_queries else [])
