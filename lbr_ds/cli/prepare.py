"""`lbr-ds prepare`: raw corpora to verified shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import Overrides, Recipe
from lbr_ds.system.failures import writing
from lbr_ds.system.urls import public_url

_SAMPLES = (4, 3, 3, 3)  # records of gl, cl, eval and control that are shown


def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Turn raw corpora into clean, leak-checked splits, stored as tar shards.

    Example: `lbr-ds prepare demo`
    """
    from lbr_ds.api import prepare as prepare_data
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    with writing(public_url(run.data.folder)):
        curation = prepare_data(run)
    show_curation(curation, run.data.local_folder)


def show_curation(curation: dict[str, Any], folder: Path) -> None:
    """Print sizes, lengths, dropped records, samples and leaks of prepared data."""
    console = Console()
    table = Table("split", "records", "groups", "query p50 / p99", "passage p50 / p99")
    for name, split in curation["splits"].items():
        lengths = [split["characters"].get(part) for part in ("query", "positives")]
        cells = [f"{c['p50']} / {c['p99']}" if c else "-" for c in lengths]
        table.add_row(name, str(split["records"]), str(split["groups"]), *cells)
    console.print(table)
    tied, groups = curation["components"], curation["groups"]
    console.print(
        f"lengths are in characters; the largest set of linked records, which must stay in one "
        f"split, has {tied['largest']} records, and the largest group {groups['largest']}",
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
            line = f"{name}: {shown[:70]} -> {answer}" if answer else f"{name}: {shown}"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
    if "entities" in curation:
        _show_entities(console, curation["entities"], curation["eval_texts_in_gl"])
    leaks = curation["leaks"]
    reused = " (reused: nothing has changed)" if curation["reused"] else ""
    console.print(
        f"texts shared between eval and gl: {leaks['eval_gl']}, and cl: {leaks['eval_cl']}; "
        f"nearly: {leaks['near_eval_gl']}, {leaks['near_eval_cl']}\n"
        f"written to {folder}{reused}; details are in {folder / 'curation.json'}",
        highlight=False,
        soft_wrap=True,
    )


def _show_entities(console: Console, entities: dict[str, int], in_gl: dict[str, int]) -> None:
    """Print how many entities the knowledge split has in each split."""
    console.print(
        f"knowledge split: {entities['cl']} entities in stage 2, {entities['eval']} held out, "
        f"{entities['control']} control; gl has the facts of {entities['gl']} entities, of which "
        f"{entities['gl_facts_only']} have no pairs\n"
        f"{in_gl['near_queries']} queries and {in_gl['near_passages']} passages of eval are also "
        "in gl, exactly or nearly, as facts of their own entity (not a leak under this protocol)",
        highlight=False,
        soft_wrap=True,
    )
