"""`lbr-ds demo`: prepare, stage 1, stage 2, export, evaluate, report, on real data, in minutes.

    OUT/data/icd10cm/  OUT/run/  OUT/model/  OUT/report.json  OUT/report.html

Each part is the verb that a user would type, so the demo exercises what users run. Parts whose
result exists are not repeated.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_ds.config import RunConfig, load
from lbr_ds.system.atomic import write_json
from lbr_ds.system.children import run_verb
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.tables import print_table

log = logging.getLogger(__name__)

QUERIES = 400  # held-out queries scored; the corpus of passages stays whole
EXAMPLES = 5  # of them are shown in the report with what each model finds


def demo(out: Path, nproc: int | None, overrides: list[str]) -> dict[str, Any]:
    """Run the parts that are missing below `out` and print the scores.

    Args:
        out: The folder of data, run, export and report.
        nproc: Ranks of both trainings; None: one per GPU, or 2 on CPUs.
        overrides: Of the recipe `demo`, `key.sub=value`.

    Returns:
        The content of report.json.
    """
    placed = [f"run={out / 'run'}", f"data.folder={out / 'data' / 'icd10cm'}", *overrides]
    run = load("demo", placed)
    ranks = _ranks(run, nproc)
    with lock_folder(out, cure="wait until it has ended, or give another folder with --out"):
        return _demo(out, run, placed, ranks)


def _demo(out: Path, run: RunConfig, placed: list[str], ranks: int) -> dict[str, Any]:
    seconds: dict[str, float] = {}

    def part(name: str, work: Callable[[], Any]) -> None:
        log.info("== %s", name)
        began = time.perf_counter()
        work()
        seconds[name] = round(time.perf_counter() - began, 1)

    part("prepare", lambda: run_verb("prepare", "demo", *placed))
    for number in (1, 2):
        command = ("train", "demo", *placed, "--stage", str(number), "--nproc", str(ranks))
        part(f"stage{number}", functools.partial(run_verb, *command))
    part("evaluate", lambda: _evaluate(run, **_not_scored(run)))
    # The exported folder comes last, so that its model card has the scores of all three. It is
    # scored again at each start, because its card gets the scores after they are written.
    if not (out / "model").exists():
        part("export", lambda: run_verb("export", str(run.run), str(out / "model")))
    part("evaluate the export", lambda: _evaluate(run, stage2=out / "model"))
    return _finish(out, run, seconds)


def _ranks(run: RunConfig, nproc: int | None) -> int:
    """Return the number of ranks for both stages; raises ConfigError for an impossible one."""
    import torch

    from lbr_ds.training.launch import check_nproc

    ranks = nproc or torch.cuda.device_count() or 2
    check_nproc(ranks, [run.stage(number).samples_per_step for number in (1, 2)])
    return ranks


def _not_scored(run: RunConfig) -> dict[str, Path]:
    """Return the backbone and stage 1, except what has scores newer than it and the data."""
    from lbr_ds import runs

    data = run.data.local_folder / "manifest.json"
    models = {"base": run.run / "backbone", "stage1": runs.checkpoints(run.run / "stage1")[-1]}
    return {
        name: model
        for name, model in models.items()
        if not _is_newer(run.run / "eval" / f"{name}.json", model / runs.MANIFEST, data)
    }


def _evaluate(run: RunConfig, **models: Path) -> None:
    """Score each model on the same held-out queries, into RUN/eval/NAME.json."""
    for name, model in models.items():
        run_verb(
            "eval",
            str(model),
            "--data",
            str(run.data.folder),
            "--max-queries",
            str(QUERIES),
            "--examples",
            str(EXAMPLES),
            "--out",
            str(run.run / "eval" / f"{name}.json"),
        )


def _is_newer(file: Path, *sources: Path) -> bool:
    """Return whether a file exists and was written after its sources, which all exist."""
    if not all(path.is_file() for path in (file, *sources)):
        return False
    return all(file.stat().st_mtime_ns > path.stat().st_mtime_ns for path in sources)


def _finish(out: Path, run: RunConfig, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the report, add the figures of `summary` to report.json, and print the scores."""
    from lbr_ds.report import write_report

    content = write_report([run.run], out)
    content |= summary(run, seconds)
    write_json(out / "report.json", content)
    rows = [
        [name, f"{score['recall_at_10']:.4f}", f"{score['ndcg_at_10']:.4f}"]
        for name, score in content["retrieval"].items()
    ]
    title = f"held-out {run.data.sources[0].name} pairs"
    print_table(["model", "R@10", "N@10"], rows, title=title)
    log.info("report: %s", out / "report.html")
    return content


def summary(run: RunConfig, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the few figures of a demo that a script reads: ranks, scores, counts and times."""
    from lbr_ds import runs

    retrieval = {}
    for name in ("base", "stage1", "stage2"):
        tasks = json.loads((run.run / "eval" / f"{name}.json").read_text())["tasks"]
        scores = next(iter(tasks.values()))
        retrieval[name] = {k: scores[k] for k in ("recall_at_10", "ndcg_at_10")}
    curation = json.loads((run.data.local_folder / "curation.json").read_text())
    checkpoint = runs.checkpoints(run.run / "stage2")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    return {
        "zero_stage": state["zero_stage"],
        "world_size": state["world_size"],
        "retrieval": retrieval,
        "counts": {name: split["records"] for name, split in curation["splits"].items()},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }
