"""Divide a table into jobs: folders to fill, and the commands that fill them.

ROOT/runs/
  backbone-HASH/   backbone/  eval/base.json              phase 0
  stage1-HASH/     a run folder with stage 1 only         phase 1; its backbone is a link
  stage2-HASH/     a run folder with stage 2              phase 2; backbone and stage1 are links
  model-NAME-HASH/ eval/base.json                         phase 0; a model of others

HASH covers everything that decides the numbers: those keys of the recipe, the precision of the
ds_config, the content of the data and of a local backbone, and for stage 2 its stage 1. So every
table that needs a job finds it again, even if backbone and data were moved; a changed recipe,
backbone or dataset makes a new job. Jobs of one phase do not depend on each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbr_ds import lineage, runs
from lbr_ds.config import STAGES, RunConfig, load
from lbr_ds.config import ds_config as layout
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.evaluation.baselines import BASELINES
from lbr_ds.reproduce.tables import Variant
from lbr_ds.shards import Manifest

NAMES = ("base", "stage1", "stage2")  # eval/NAME.json of a phase


@dataclass(frozen=True)
class RecipeSource:
    """The recipe that all jobs of a table start from; `root` is the parent of `runs/`."""

    recipe: str
    overrides: tuple[str, ...]
    root: Path


@dataclass(frozen=True)
class Job:
    """One folder to fill.

    Attributes:
        phase: 0: a backbone, or a model of others; 1 and 2: that stage of training.
        folder: Where the result is stored.
        run: Its resolved recipe.
        arguments: Recipe and overrides for the command line.
        links: (name, target) of the symbolic links in it.
        model: The name of a model of others; "" for our own.
        needs_scores: Whether it is to be scored. A backbone is, if a row of the table shows it;
            stage 1 always is, also for `results.separation_predicts`.
    """

    phase: int
    folder: Path
    run: RunConfig
    arguments: tuple[str, ...]
    links: tuple[tuple[str, Path], ...] = ()
    model: str = ""
    needs_scores: bool = True

    @property
    def scores(self) -> Path:
        """The file of its evaluation."""
        return self.folder / "eval" / f"{NAMES[self.phase]}.json"

    @property
    def scored_model(self) -> str:
        """The model argument of `lbr-ds eval`."""
        place = ("backbone", "stage1", "stage2")[self.phase]
        return self.model or str(self.folder / place)

    def train_command(self, nproc: int | None) -> list[str]:
        """Return the arguments of `lbr-ds` that train it."""
        ranks = ["--nproc", str(nproc)] if nproc else []
        return ["train", *self.arguments, "--stage", str(self.phase), *ranks]

    def eval_command(self, max_queries: int | None, generation: bool) -> list[str]:
        """Return the arguments of `lbr-ds` that score it."""
        words = [
            "eval",
            self.scored_model,
            "--data",
            str(self.run.data.folder),
            "--out",
            str(self.scores),
            "--examples",
            "0",
        ]
        words += ["--max-queries", str(max_queries)] if max_queries else []
        return words + ["--generation"] * (generation and not self.model)

    def trained(self) -> bool:
        """Return whether its model exists: a backbone, or the checkpoint of the last step."""
        if self.phase == 0:
            return bool(self.model) or (self.folder / "backbone" / "lbr.json").is_file()
        split = STAGES[self.phase].split
        steps = self.run.stage(self.phase).steps(Manifest.load(self.run.data.folder).records(split))
        saved = runs.checkpoints(self.folder / f"stage{self.phase}")
        return bool(saved) and runs.step_of(saved[-1]) >= steps

    def scored(self, max_queries: int | None, generation: bool) -> bool:
        """Return whether its evaluation exists with these options, or is not needed."""
        if not self.needs_scores:
            return True
        if not self.scores.is_file():
            return False
        result = json.loads(self.scores.read_text(encoding="utf-8"))
        wants = generation and not self.model
        return result["max_queries"] == max_queries and (not wants or "generation" in result)


def jobs_of(variant: Variant, seed: int, source: RecipeSource) -> list[Job]:
    """Return the jobs of one row, each after those it needs; the last one has the row's scores."""
    if variant.model:
        return [_model_of_others(variant, source)]
    jobs = [_backbone(variant, seed, source, ())]
    if 1 in variant.stages:
        jobs.append(_stage(1, jobs, variant, seed, source))
    if 2 in variant.stages:
        if variant.represent:  # stage 2 has a backbone of its own, whose card holds the change
            jobs.insert(0, _backbone(variant, seed, source, variant.represent))
        jobs.append(_stage(2, jobs, variant, seed, source))
    return jobs


def sorted_jobs(rows: list[list[Job]]) -> list[Job]:
    """Return the jobs of all rows, each once, phase by phase."""
    shown = {row[-1].folder for row in rows}
    jobs = {}
    for job in (job for row in rows for job in row):
        needed = job.phase > 0 or job.folder in shown
        jobs[job.folder] = replace(job, needs_scores=needed)
    return sorted(jobs.values(), key=lambda job: job.phase)


def _model_of_others(variant: Variant, source: RecipeSource) -> Job:
    arguments = (source.recipe, *source.overrides)
    run = load(source.recipe, source.overrides)
    known = BASELINES.get(variant.model)
    name = re.sub(r"\W+", "-", variant.model).strip("-")
    folder = _folder(source, f"model-{name}", known.model if known else variant.model, _data(run))
    return Job(0, folder, run, arguments, model=variant.model)


def _backbone(variant: Variant, seed: int, source: RecipeSource, more: tuple[str, ...]) -> Job:
    overrides = (*source.overrides, *variant.learn, *variant.data, *more, f"seed={seed}")
    run = load(source.recipe, overrides)
    plain = json.loads(run.model_dump_json(include={"model", "bottleneck", "seed"}))
    folder = _folder(source, "backbone", _by_content(plain, run), _data(run))
    return Job(0, folder, run, (source.recipe, *overrides))


def _stage(
    number: int, before: list[Job], variant: Variant, seed: int, source: RecipeSource
) -> Job:
    """Return the job of a stage; before: its backbone and, for stage 2, a stage 1 if it has one."""
    own = variant.represent if number == 2 else ()
    stage1 = [job for job in before if job.phase == 1]
    # Stage 1 is scored at its last checkpoint, so stage 2 starts there, too: the result does not
    # depend on how often stage 1 was saved, and no checkpoint is selected on the pairs that score
    # the table. A `stage2.from` on the command line takes precedence.
    start = ("stage2.from=last",) if number == 2 else ()
    if number == 2 and not stage1:
        own = (*own, "stage2.from=backbone")
    overrides = (*start, *source.overrides, *variant.learn, *variant.data, *own, f"seed={seed}")
    run = load(source.recipe, overrides)
    parents = [job.folder.name for job in stage1]
    decisive = _by_content(run.result_settings(number), run), _precision(run)
    folder = _folder(source, f"stage{number}", *decisive, _data(run, number), parents)
    links = [("backbone", before[0].folder / "backbone")]
    links += [("stage1", job.folder / "stage1") for job in stage1]
    arguments = (source.recipe, *overrides, f"run={folder}")
    return Job(number, folder, run.model_copy(update={"run": folder}), arguments, tuple(links))


def _by_content(recipe: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    """Return `recipe` with hashes in place of the paths of a backbone and of stage 2's weights.

    A name of the Hub and a `wheel:` address stay: they are the same on every node, whether or not
    the files are there yet. A run whose files changed later is refused when it starts.
    """
    made = {**recipe}
    if content := _content(run, run.model.backbone):
        made["model"] = {**recipe["model"], "backbone": content, "revision": None}
    if "stage2" in recipe and (content := _content(run, run.stage2.start_from)):
        made["stage2"] = {**recipe["stage2"], "start_from": content}
    return made


def _content(run: RunConfig, place: str) -> dict[str, str] | None:
    """Return the hashes of a folder or file on this disk; None for anything else."""
    if not Path(place).expanduser().exists():
        return None
    backbone = lineage.identify(run.model.model_copy(update={"backbone": place}))
    return backbone.model_dump(exclude={"name", "num_layers"}) if backbone else None


def _precision(run: RunConfig) -> tuple[int | bool, ...] | None:
    """Return that of the ds_config; None for `auto`, which each node chooses by its GPUs."""
    name = run.engine.ds_config
    return None if name == "auto" else layout.load(name).precision


def _folder(source: RecipeSource, kind: str, *decisive: Any) -> Path:
    text = json.dumps(decisive, sort_keys=True)
    return source.root / "runs" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _data(run: RunConfig, stage: int = 1) -> str:
    """Return the fingerprint of what the stage reads of the data."""
    try:
        manifest = Manifest.load(run.data.folder)
    except DataError:
        return "not prepared"  # a dry run may list jobs before there is data
    return lineage.fingerprint_of(manifest, stage)


def link(job: Job) -> None:
    """Make the job's folder with its links. Raises ConfigError if a target does not exist."""
    for _, target in job.links:
        if not target.exists():
            raise ConfigError(
                f"{job.folder.name} starts from {target}, which a job of an earlier phase makes; "
                "run that one first (--dry-run lists jobs and phases)"
            )
    job.folder.mkdir(parents=True, exist_ok=True)
    for name, target in job.links:
        if not (job.folder / name).is_symlink():
            (job.folder / name).symlink_to(os.path.relpath(target, job.folder))
