"""Reproduce a table of the paper with a recipe: train its variants and compare their scores.

    reproduce("table3", "medical-demo", seeds=[0, 1, 2])

1. `tables.py`: the table as a list of variants; `paper.py`: the paper's own figures.
2. `jobs.py`: the folders that the variants need, below ROOT = RUN/reproduce.
3. Missing models are trained, one after another, each as `lbr-ds train` in a process of its own;
   then missing scores are computed. With `jobs` several jobs run at once (`parallel.py`), if there
   is memory for them (`capacity.py`).
4. `results.py`, `plot.py`: ROOT/TABLE/{RESULT.md, result.json, result.png}.

A repeated command resumes: it does nothing twice, whichever table the work was done for.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lbr_ds.config import RunConfig, load
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.reproduce.capacity import check_memory, environments
from lbr_ds.reproduce.jobs import Job, RecipeSource, jobs_of, link, sorted_jobs
from lbr_ds.reproduce.paper import PAPER
from lbr_ds.reproduce.parallel import Numbered, run_jobs
from lbr_ds.reproduce.plot import plot_result
from lbr_ds.reproduce.results import TableRow, collect, render
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
    jobs: int = 1,
) -> dict[str, Any] | None:
    """Train and score what a table lacks, and write the result below RUN/reproduce.

    Args:
        name: A key of `TABLES`.
        recipe: A recipe's name or file.
        overrides: Overrides of recipe keys, `key.sub=value`.
        seeds: Seeds of training; the data stays the same. Empty: the recipe's own seed.
        nproc: Ranks of each training.
        max_queries: Score a seeded sample of the held-out queries.
        only: Do only the job of this number in `list_jobs`, for job arrays.
        jobs: How many jobs run at once. With more than one, `nproc` is 1 by default.

    Returns:
        The content of result.json with "folder" and "command"; None with `only`.

    Raises:
        ConfigError: An unknown table or job, or a number of ranks that cannot train the recipe.
        EnvironmentProblem: The memory does not suffice for so many jobs at once.
        LbrError: A training failed or was stopped.
    """
    if only is not None and jobs > 1:
        raise ConfigError(f"--only {only} runs one job; leave out --jobs {jobs}")
    ranks = nproc or (1 if jobs > 1 else None)
    request = _Request(name, recipe, tuple(overrides), tuple(seeds), ranks, max_queries)
    request.check_ranks()
    # Jobs of an array run side by side; the lock of a run folder keeps each to itself.
    alone = lock_folder(request.folder, cure="wait until it has ended")
    with alone if only is None else nullcontext():
        return _reproduce(request, only, jobs)


@dataclass(frozen=True)
class _Request:
    """What `reproduce` was called with, and what follows from it."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    nproc: int | None
    max_queries: int | None

    @cached_property
    def run(self) -> RunConfig:
        return load(self.recipe, list(self.overrides))

    @cached_property
    def table(self) -> Table:
        if self.name not in TABLES:
            raise ConfigError(f"unknown table {self.name!r}; one of {', '.join(TABLES)}")
        return TABLES[self.name](self.run)

    @property
    def root(self) -> Path:
        return self.run.run / "reproduce"

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def command(self) -> str:
        words = ["lbr-ds", "reproduce", self.name, self.recipe, *self.overrides]
        words += ["--seeds", ",".join(map(str, self.seeds))] if self.seeds else []
        words += ["--max-queries", str(self.max_queries)] if self.max_queries else []
        return shlex.join(words)

    def check_ranks(self) -> None:
        """Raise ConfigError for an unknown table and for ranks that cannot train the recipe."""
        _ = self.table
        if self.nproc is not None:
            from lbr_ds.training.launch import check_nproc

            check_nproc(self.nproc, [self.run.stage(number).samples_per_step for number in (1, 2)])

    def rows(self) -> list[TableRow]:
        """Return the rows of the table, each with the jobs that it needs."""
        source = RecipeSource(self.recipe, self.overrides, self.root)
        return [
            TableRow(variant, seed, jobs_of(variant, seed or 0, source))
            for variant in self.table.variants
            for seed in ([None] if variant.model else self.seeds or [self.run.seed])
        ]

    def preparations(self) -> list[list[str]]:
        """Return the `prepare` commands of data that does not exist yet."""
        commands = []
        for more in dict.fromkeys(variant.data for variant in self.table.variants):
            data = load(self.recipe, [*self.overrides, *more]).data
            if isinstance(data.folder, Path) and not (data.folder / "manifest.json").is_file():
                commands.append(["prepare", self.recipe, *self.overrides, *more])
        return commands


def _reproduce(request: _Request, only: int | None, at_once: int) -> dict[str, Any] | None:
    table = request.table
    _prepare(request)
    rows = request.rows()
    jobs = sorted_jobs([row.jobs for row in rows])
    if at_once > 1:
        _run_at_once(request, jobs, at_once)
    if only is not None:
        if not 0 <= only < len(jobs):
            raise ConfigError(f"--only {only}: {request.name} has jobs 0 to {len(jobs) - 1}")
        jobs = [jobs[only]]
    missing = [job for job in jobs if not job.trained()]
    for number, job in enumerate(missing, 1):
        log.info("== training %d of %d: %s", number, len(missing), job.folder.name)
        _train(job, request.nproc)
    unscored = [job for job in jobs if not job.scored(request.max_queries, table.generation)]
    notes = []
    for number, job in enumerate(unscored, 1):
        log.info("== scoring %d of %d: %s", number, len(unscored), job.folder.name)
        if note := _score(job, request.max_queries, table.generation):
            notes.append(note)
    if only is not None:
        return None
    result = collect(request.name, table, rows, request.run, request.root, notes)
    result |= {"folder": str(request.folder), "command": request.command}
    plot_result(result, table, request.folder / "result.png")
    write_text(request.folder / "RESULT.md", render(result, table))
    write_json(request.folder / "result.json", result)
    return result


def _run_at_once(request: _Request, jobs: list[Job], at_once: int) -> None:
    """Train and score what is missing, `at_once` jobs at a time; not models of others."""
    missing = [
        Numbered(number, job)
        for number, job in enumerate(jobs)
        if not job.model
        and not (job.trained() and job.scored(request.max_queries, request.table.generation))
    ]
    ranks = request.nproc or 1
    words = shlex.split(request.command)[1:]
    words += check_memory([one.job for one in missing], at_once, ranks)
    run_jobs(
        missing,
        [sys.executable, "-m", "lbr_ds", *words, "--nproc", str(ranks)],
        at_once=at_once,
        environments=environments(at_once, ranks),
        logs=request.root / "logs",
    )


def list_jobs(
    name: str,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    nproc: int | None = None,
    max_queries: int | None = None,
) -> list[str]:
    """Return a line for each job of `reproduce`: its number, its phase and what is missing.

    Nothing is changed on disk. A job needs only jobs of earlier phases. Before the data is prepared
    the names of the folders are provisional. Arguments and errors are those of `reproduce`.
    """
    request = _Request(name, recipe, tuple(overrides), tuple(seeds), nproc, max_queries)
    table = request.table
    lines = [f"# lbr-ds {shlex.join(words)}" for words in request.preparations()]
    for number, job in enumerate(sorted_jobs([row.jobs for row in request.rows()])):
        missing = []
        if not _is_trained(job):
            train = shlex.join(job.train_command(nproc))
            missing.append(f"lbr-ds {train}" if job.phase else f"make {job.folder / 'backbone'}")
        if not job.scored(max_queries, table.generation):
            missing.append(f"lbr-ds {shlex.join(job.eval_command(max_queries, table.generation))}")
        lines.append(f"{number} phase {job.phase}: {' && '.join(missing) or 'done'}")
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
    jobs: int,
    out: Path | None,
) -> str:
    """Run `lbr-ds reproduce` and return the text that it prints.

    Args:
        name: As for `reproduce`.
        recipe: As for `reproduce`.
        overrides: As for `reproduce`.
        seeds: Whole numbers with commas, "0,1,2".
        nproc: As for `reproduce`.
        max_queries: As for `reproduce`.
        dry_run: Whether to list the jobs instead of running them.
        only: As for `reproduce`.
        jobs: As for `reproduce`.
        out: A file for the result as JSON, besides result.json.
    """
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
        name,
        recipe,
        overrides,
        seeds=numbers,
        nproc=nproc,
        max_queries=max_queries,
        only=only,
        jobs=jobs,
    )
    if result is None:
        return f"job {only} of {name} is done"
    if out is not None:
        write_json(out, result)
    text = Path(result["folder"], "RESULT.md").read_text(encoding="utf-8")
    return f"{text}\nwritten to {result['folder']}{f' and {out}' if out else ''}"


def _prepare(request: _Request) -> None:
    """Prepare missing data. Raises DataError when the variants' held-out texts differ."""
    for words in request.preparations():
        run_verb(*words)
    held_out = {}
    for more in dict.fromkeys(variant.data for variant in request.table.variants):
        folder = load(request.recipe, [*request.overrides, *more]).data.folder
        held_out[tuple(s.sha256 for s in Manifest.load(folder).shards("eval"))] = folder
    if len(held_out) > 1:
        folders = " and ".join(map(str, held_out.values()))
        raise DataError(f"{folders} hold different eval splits; remove them to prepare them again")


def _is_trained(job: Job) -> bool:
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
    """Score a job's model; return why a model of others was left out, else ""."""
    from lbr_ds.evaluation import EvalOptions, evaluate

    options = EvalOptions(max_queries=max_queries, generation=generation and not job.model)
    try:
        evaluate(job.scored_model, data=job.run.data.folder, output=job.scores, options=options)
    except (ConfigError, EnvironmentProblem) as error:
        if not job.model:
            raise
        command = shlex.join(["lbr-ds", *job.eval_command(max_queries, generation)])
        return (
            f"{job.model} is left out: {error}. To add it, run `{command}` and repeat this command."
        )
    return ""
