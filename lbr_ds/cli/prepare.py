"""`lbr-ds prepare`: raw corpora to verified shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import Overrides, Recipe
from lbr_ds.errors import ConfigError
from lbr_ds.system.failures import writing
from lbr_ds.system.slurm import slurm_tasks
from lbr_ds.system.urls import public_url

if TYPE_CHECKING:
    from lbr_ds.corpora.nodes import Spread

_Engine = Annotated[
    str | None,
    typer.Option(
        help="datatrove: several nodes share the work, with one srun task on each node. Needs the "
        "extra lbr-ds[engine]."
    ),
]
_Tasks = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=512,
        help="With --engine: number of tasks of each phase, ideally a multiple of the number of "
        "cores of all nodes. A killed task is repeated alone. Default: 64 per node.",
    ),
]
_Nodes = Annotated[
    int | None,
    typer.Option(min=1, help="With --engine and without srun: the number of nodes."),
]
_Node = Annotated[
    int | None,
    typer.Option(
        min=0, help="With --nodes: the index of this node. Node 0 coordinates the others."
    ),
]
_TASKS_PER_NODE = 64
_SAMPLES = (4, 3, 3, 3)  # records of gl, cl, eval and control that are shown


def prepare(
    recipe: Recipe,
    overrides: Overrides = None,
    engine: _Engine = None,
    tasks: _Tasks = None,
    nodes: _Nodes = None,
    node: _Node = None,
) -> None:
    """Clean raw corpora, split them without leaks, and store the splits as tar shards.

    Example: `lbr-ds prepare demo`

    Several nodes: `srun --ntasks-per-node=1 lbr-ds prepare my.yaml --engine datatrove`
    """
    from lbr_ds.api import prepare as prepare_data
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    spread = _spread(engine, tasks, nodes, node)
    with writing(public_url(run.data.folder)):
        curation = prepare_data(run, spread=spread)
    if curation:
        show_curation(curation, run.data.local_folder)


def _spread(
    engine: str | None, tasks: int | None, nodes: int | None, node: int | None
) -> Spread | None:
    """Return this process's place among the nodes.

    Raises:
        ConfigError: The options contradict each other.
    """
    from lbr_ds.corpora.nodes import Spread

    if engine is None:
        if (tasks, nodes, node) != (None, None, None):
            raise ConfigError("--tasks, --nodes and --node need --engine datatrove")
        return None
    if engine != "datatrove":
        raise ConfigError(f"--engine {engine}: unknown; the only one is datatrove")
    if (nodes is None) != (node is None):
        raise ConfigError("--nodes and --node belong together; under srun leave both out")
    if nodes is None or node is None:
        nodes = slurm_tasks() or 1
        node = int(os.environ["SLURM_PROCID"]) if nodes > 1 else 0
    if not node < nodes:
        raise ConfigError(f"--node {node}: the nodes are numbered 0 to {nodes - 1}")
    return Spread(tasks or _TASKS_PER_NODE * nodes, node, nodes)


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
