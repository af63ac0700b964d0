"""`lbr-ds mine`: hard negatives for stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import EncodingRanks, Overrides, Recipe, join_or_launch
from lbr_ds.system.atomic import try_recover
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import public_url


def mine(recipe: Recipe, overrides: Overrides = None, nproc: EncodingRanks = None) -> None:
    """Find hard negatives with BM25 or a model and write them into the split that stage 2 uses.

    Example: `lbr-ds mine demo mining.keep=2`
    """
    from lbr_ds.config import STAGES, load
    from lbr_ds.shards import Manifest

    run = load(recipe, overrides or [])
    folder = run.data.local_folder
    try_recover(folder)  # a killed command may have left it under another name
    Manifest.load(folder).records(STAGES[2].split)  # before torch is imported, which takes seconds
    from lbr_ds.mining.mine import mine as mine_negatives

    world = join_or_launch(nproc, run.engine.timeout_minutes)
    with show_progress() as progress, writing(public_url(run.data.folder)):
        audit = mine_negatives(run, progress, world)
    if audit is not None:
        show_mining(audit, run.data.local_folder, run.stage2.num_negatives)


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
