"""`lbr-ds mine`: hard negatives for stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import EncodingRanks, Overrides, Recipe, join_or_launch
from lbr_ds.errors import ConfigError
from lbr_ds.system.atomic import try_recover
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import public_url


def mine(
    recipe: Recipe,
    overrides: Overrides = None,
    score_with: Annotated[
        str | None,
        typer.Option(
            help="After mining, score positives and negatives with this teacher, a cross-encoder "
            "or an embedding model. The same as mining.score_with=MODEL."
        ),
    ] = None,
    teacher_vectors: Annotated[
        str | None,
        typer.Option(
            help="After mining, store the vectors of this embedding model, the teacher, beside the "
            "shards. The same as mining.teacher_vectors=MODEL."
        ),
    ] = None,
    keep_negatives: Annotated[
        bool,
        typer.Option(
            "--keep-negatives",
            help="Do not mine. The teacher uses the negatives that the split cl already has.",
        ),
    ] = False,
    nproc: EncodingRanks = None,
) -> None:
    """Find hard negatives with BM25 or a model and write them into the split that stage 2 uses.

    Example: `lbr-ds mine demo mining.keep=2 --score-with cross-encoder/ms-marco-MiniLM-L6-v2`
    """
    from lbr_ds.config import STAGES, load
    from lbr_ds.shards import Manifest

    named = {"score_with": score_with, "teacher_vectors": teacher_vectors}
    given = [f"mining.{key}={json.dumps(value)}" for key, value in named.items() if value]
    run = load(recipe, [*(overrides or []), *given])
    if keep_negatives and not run.mining.has_teacher:
        raise ConfigError(
            "--keep-negatives mines nothing, and there is no teacher; add --score-with MODEL or "
            "--teacher-vectors MODEL"
        )
    folder = run.data.local_folder
    try_recover(folder)  # a killed command may have left it under another name
    Manifest.load(folder).records(STAGES[2].split)  # before torch is imported, which takes seconds
    from lbr_ds.mining.mine import mine as mine_negatives
    from lbr_ds.mining.teach import mined, teach

    world = join_or_launch(nproc, run.engine.timeout_minutes)
    audit = taught = None
    with show_progress() as progress, writing(public_url(run.data.folder)):
        if not keep_negatives:
            audit = mine_negatives(run, progress, world, stay=run.mining.has_teacher)
            if world.first:
                mined(world)
        if run.mining.has_teacher:
            taught = teach(run, progress, world, after_mining=not keep_negatives)
    if audit is not None:
        show_mining(audit, run.data.local_folder, run.stage2.num_negatives)
    if taught is not None:
        show_teaching(taught, run.data.local_folder)


def show_mining(audit: dict[str, Any], folder: Path, used: int) -> None:
    """Print what was kept and dropped, with examples; `used`: the recipe's stage2.num_negatives."""
    console = Console()
    table = Table("candidates", "count")
    table.add_row("seen", str(audit["candidates_seen"]))
    table.add_row("kept as negatives", str(audit["kept"]))
    for reason, count in audit["dropped"].items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", str(count))
    console.print(table)
    for example in audit["examples"]:
        for part in ("query", "positive", "negative"):
            line = f"{part:>8}: {example[part][:100]}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"          {example['method']} rank {example['rank']}, score {example['score']}, "
            f"{example['ratio']} of the positive's",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    short, none = audit["queries_left_short"], audit["queries_with_none"]
    reused = " (reused: nothing has changed)" if audit["reused"] else ""
    console.print(
        f"{audit['queries']} queries over {audit['passages']} passages; {short} have fewer than "
        f"{audit['settings']['keep']} negatives, including {none} with none\n"
        f"written to {folder}{reused}; details are in {folder / 'mining.json'}\n"
        f"training uses stage2.num_negatives={used} of them per record",
        highlight=False,
        soft_wrap=True,
    )


def show_teaching(audit: dict[str, Any], folder: Path) -> None:
    """Print how a teacher sees the positives and negatives."""
    lines = []
    if scores := audit.get("scores"):
        lines.append(
            f"{scores['kind']} {scores['name']} scored {scores['positives']} positives and "
            f"{scores['negatives']} negatives of {scores['queries']} queries"
        )
    if scores and scores["negatives"]:
        of = ", ".join(f"{name} {value:g}" for name, value in scores["margins"].items())
        share = scores["negatives_above_the_positive"] / scores["negatives"]
        lines.append(
            f"margins of the positive over a negative: {of}; "
            f"{scores['negatives_above_the_positive']} negatives ({share:.1%}) of "
            f"{scores['queries_with_a_negative_above']} queries score above it"
        )
    if vectors := audit.get("vectors"):
        lines.append(
            f"{vectors['name']}: vectors of {vectors['queries']} queries and "
            f"{vectors['passages']} passages, dimension {vectors['dimension']}"
        )
    reused = " (reused: nothing has changed)" if audit["reused"] else ""
    lines.append(
        f"written to {folder}{reused}; details are in {folder / 'teacher.json'}\n"
        "training uses it with stage2.distillation.loss"
    )
    Console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
