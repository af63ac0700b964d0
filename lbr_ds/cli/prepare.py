"""`lbr-ds prepare`: raw corpora to verified shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import Overrides, Recipe
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import public_url

_SAMPLES = (4, 3, 3, 3)  # records of gl, cl, eval and control that are shown


def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Turn raw corpora into clean, leak-checked splits, stored as tar shards.

    Example: `lbr-ds prepare demo`
    """
    from lbr_ds.config import load
    from lbr_ds.corpora.prepare import prepare as prepare_data

    run = load(recipe, overrides or [])
    with show_progress() as progress, writing(public_url(run.data.folder)):
        curation = prepare_data(run.data, run.seed, progress, run.model, run.bottleneck.count)
    show_curation(curation, run.data.local_folder)


def show_curation(curation: dict[str, Any], folder: Path) -> None:
    """What `prepare` made, for a person to judge: sizes, lengths, drops, samples, leaks."""
    console = Console()
    table = Table("split", "records", "groups", "query p50 / p99", "passage p50 / p99")
    for name, split in curation["splits"].items():
        lengths = [split["characters"].get(part) for part in ("query", "positives")]
        cells = [f"{c['p50']} / {c['p99']}" if c else "-" for c in lengths]
        table.add_row(name, str(split["records"]), str(split["groups"]), *cells)
    console.print(table)
    tied, groups = curation["components"], curation["groups"]
    console.print(
        f"lengths are in characters; {tied['largest']} records at most are tied into one split, "
        f"{groups['largest']} at most are one group",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    for kind in ("dropped_records", "dropped_texts"):
        for rule, found in curation[kind].items():
            console.print(f"{kind.replace('_', ' ')}, {rule}: {found['count']}", highlight=False)
    for (name, split), number in zip(curation["splits"].items(), _SAMPLES, strict=False):
        for sample in split["samples"][:number]:
            shown = sample.get("query") or sample.get("text", "")
            answer = " ".join((sample.get("positives") or [""])[0].split())
            line = f"{name}: {shown[:70]} -> {answer}"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
    if "entities" in curation:
        _show_entities(console, curation["entities"], curation["told_in_gl"])
    leaks = curation["leaks"]
    reused = " (reused: nothing has changed)" if curation["reused"] else ""
    console.print(
        f"texts shared between eval and gl: {leaks['eval_gl']}, and cl: {leaks['eval_cl']}; "
        f"nearly: {leaks['near_eval_gl']}, {leaks['near_eval_cl']}\n"
        f"written to {folder}{reused}; the whole account is in {folder / 'curation.json'}",
        highlight=False,
        soft_wrap=True,
    )


def _show_entities(console: Console, entities: dict[str, int], told: dict[str, int]) -> None:
    """The knowledge split: how many entities stand where."""
    console.print(
        f"knowledge split: entities asked for in stage 2 {entities['cl']}, held out "
        f"{entities['eval']}, control {entities['control']}; gl has facts of {entities['gl']}, "
        f"{entities['gl_facts_only']} of them without pairs\n"
        f"of eval {told['near_queries']} queries and {told['near_passages']} passages stand in gl, "
        "equal or nearly, as facts of their own entity (no leak here)",
        highlight=False,
        soft_wrap=True,
    )
