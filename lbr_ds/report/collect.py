"""Read a run folder: recipe, metrics of both stages, evaluations, data counts, environment."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lbr_ds import config, lineage, runs
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation.scores import read_scores
from lbr_ds.report.data import read_data
from lbr_ds.report.reading import number, read_json, read_metrics
from lbr_ds.system.json_lines import read_rows

EVALS = ("base", "stage1", "stage2")
_ENDS = 10  # logged steps averaged for a stage's first and last value


@dataclass
class Stage:
    """The logged steps of one stage, one row a step, in step order, and its evaluations likewise.

    start: what it started from at step 0, if known.
    """

    number: int
    rows: list[dict[str, Any]]
    saved: dict[str, Any] = field(default_factory=dict)  # state.json of the newest checkpoint
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    start: str | None = None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return (steps, values) of one measure; a value that is missing or not a number is NaN.

        `evaluation/NAME` is a measure on held-out data in training.
        """
        name = key.removeprefix("evaluation/")
        rows = self.rows if name == key else self.evaluations
        return [float(row["step"]) for row in rows], [number(row.get(name)) for row in rows]

    def has(self, key: str) -> bool:
        """Return whether any row has a finite value of this measure."""
        return any(math.isfinite(value) for value in self.series(key)[1])

    def summary(self) -> dict[str, Any]:
        """First and last value of each learning curve, and what the stage cost."""
        ends = {}
        for key in ("loss", "accuracy", "positive_cosine", "negative_cosine", "grad_norm"):
            if self.has(key):
                values = [v for v in self.series(key)[1] if math.isfinite(v)]
                ends[key] = {
                    "first": statistics.fmean(values[:_ENDS]),
                    "last": statistics.fmean(values[-_ENDS:]),
                }
        seconds, waited = self._sum("step_seconds"), self._sum("data_wait_seconds")
        return {
            "steps": self.rows[-1]["step"],
            "samples": self.rows[-1].get("samples"),
            "epoch": self.rows[-1].get("epoch"),
            "world_size": self.saved.get("world_size"),
            "zero_stage": self.saved.get("zero_stage"),
            "curves": ends,
            "seconds": seconds,
            "data_wait_share": waited / seconds if seconds and waited is not None else None,
            "tokens_per_second": self._finite("tokens_per_second", statistics.median),
            "peak_memory_gib": self._finite("memory_gib", max),
            "start": self.start,
            "evaluations": self.evaluations,
        }

    def non_finite(self) -> list[str]:
        """One sentence for each measure with values that are not finite numbers."""
        found = []
        for key in ("loss", "grad_norm", "accuracy"):
            steps = [
                row["step"]
                for row in self.rows
                if key in row and not math.isfinite(number(row[key]))
            ]
            if steps:
                many = f"{len(steps)} steps" if len(steps) > 1 else "one step"
                found.append(
                    f"Stage {self.number}: {key} is not a finite number at {many}, "
                    f"first at step {steps[0]}."
                )
        return found

    def _finite(self, key: str, choose: Any) -> float | None:
        values = [value for value in self.series(key)[1] if math.isfinite(value)]
        return choose(values) if values else None

    def _sum(self, key: str) -> float | None:
        return self._finite(key, math.fsum)


@dataclass
class Run:
    """The content of a run folder; `notes` says what it lacks."""

    folder: Path
    name: str
    recipe: dict[str, Any] | None = None
    stages: list[Stage] = field(default_factory=list)
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trained_on: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def examples(self) -> list[dict[str, Any]]:
        """Held-out queries with what the base and the trained model found, side by side.

        [{"query", "answers", "found": {"base": {"first_right", "passages"}, "stage2": ...}}]
        """
        have = [name for name in EVALS if self.evals.get(name, {}).get("examples")]
        # Stage 1's answers are left out where stage 2's are there: two columns fit, three do not.
        shown = [name for name in have if name in ("base", have[-1])]
        joined: dict[str, dict[str, Any]] = {}
        for name in shown:
            for example in self.evals[name]["examples"]:
                row = joined.setdefault(
                    example["id"],
                    {"query": example["query"], "answers": example["answers"], "found": {}},
                )
                row["found"][name] = {k: example[k] for k in ("first_right", "passages")}
        return [row for row in joined.values() if len(row["found"]) == len(shown)]

    def commands(self) -> list[str]:
        """Return the command lines that make this run again."""
        recipe, commands = self.folder / "recipe.yaml", []
        if self.recipe is None:
            return []
        program = (self.environment or {}).get("lbr-ds")
        if isinstance(program, dict) and program.get("install"):
            commands.append(str(program["install"]))
        commands.append(f"lbr-ds prepare {recipe}")
        for stage in self.stages:
            world = stage.saved.get("world_size") or 1
            ranks = f" --nproc {world}" if world > 1 else ""
            commands.append(f"lbr-ds train {recipe} --stage {stage.number}{ranks}")
        commands += [self._eval_command(name, result) for name, result in self.evals.items()]
        return [*commands, f"lbr-ds report {self.folder}"]

    def _eval_command(self, name: str, result: dict[str, Any]) -> str:
        """Return the command that repeats `eval/NAME.json` with the checkpoint that was scored."""
        last = {f"stage{s.number}": f"step-{s.rows[-1]['step']:06d}" for s in self.stages}
        place = self.folder / "backbone"
        if name in last:
            # Evaluations of earlier versions do not name their checkpoint.
            place = self.folder / name / "checkpoints" / (result.get("checkpoint") or last[name])
        elif name != "base":
            place = self.folder / name
        assert self.recipe is not None
        words = ["lbr-ds eval", str(place), "--data", self.recipe["data"]["folder"]]
        if result.get("max_queries"):
            words += ["--max-queries", str(result["max_queries"])]
        return " ".join([*words, "--out", str(self.folder / "eval" / f"{name}.json")])


def _beside(stage: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return a stage's evaluations, and what its latest start at step 0 started from."""
    found, starts = stage / "evaluations.jsonl", stage / "starts.jsonl"
    evaluations = read_metrics(found) if found.exists() else []
    origin = None
    for start in read_rows(starts):
        origin = start.get("from") if start.get("step") == 0 else origin
    return evaluations, _inside(origin, stage.parent)


def _inside(path: str | None, run: Path) -> str | None:
    """Return a path relative to the run's folder; a path elsewhere unchanged."""
    if path is None or not Path(path).is_relative_to(run):
        return path
    return str(Path(path).relative_to(run))


def _trained_on(run: Path) -> list[dict[str, Any]]:
    """Each stage of training that the run's newest model has behind it, also in earlier runs."""
    saved = [path for stage in ("stage1", "stage2") for path in runs.checkpoints(run / stage)]
    found = lineage.load(saved[-1] / "model") if saved else None
    return [
        {
            "stage": training.stage,
            "steps": training.steps,
            "split": " and ".join(filter(None, (training.split, training.replayed))),
            "data": training.data.name,
            "fingerprint": training.data.fingerprint,
            "records": training.data.splits.get(training.split),
            "sources": [source.model_dump() for source in training.data.sources],
        }
        for training in (found.history if found else ())
    ]


def read_run(folder: Path) -> Run:
    """Read one run folder; see `write_report` for what it raises."""
    stages = [folder / f"stage{n}" / "metrics.jsonl" for n in (1, 2)]
    if not any(p.exists() for p in (folder / "recipe.yaml", folder / "eval", *stages)):
        raise ConfigError(f"{folder}: not a run folder (no recipe.yaml, metrics or eval in it)")
    run = Run(folder, folder.resolve().name)
    if (folder / "recipe.yaml").exists():
        resolved = config.load(folder / "recipe.yaml")
        run.name, run.recipe = resolved.name, json.loads(resolved.model_dump_json(by_alias=True))
        run.data = read_data(resolved.data.folder)
        if not run.data:
            run.notes.append(
                f"The data folder {resolved.data.folder} is not here, so its counts are not shown."
            )
    else:
        run.notes.append("The run folder holds no recipe.yaml, so its settings are not shown.")
    for stage, path in enumerate(stages, 1):
        rows = read_metrics(path) if path.exists() else []
        if rows:
            saved = runs.checkpoints(path.parent)
            state = read_json(saved[-1] / "state.json") if saved else {}
            run.stages.append(Stage(stage, rows, state, *_beside(path.parent)))
            run.notes += run.stages[-1].non_finite()
        else:
            run.notes.append(f"Stage {stage} has not logged a step yet.")
    run.trained_on = _trained_on(folder)
    for name in EVALS:
        if (folder / "eval" / f"{name}.json").exists():
            run.evals[name] = read_scores(folder / "eval" / f"{name}.json")
    if not run.evals:
        run.notes.append("Nothing has been evaluated yet, so there is no retrieval table.")
    if (folder / "environment.json").exists():
        run.environment = read_json(folder / "environment.json")
    return run
