"""`lbr-ds bench`: benchmark suites of this program, and of a cluster."""

from __future__ import annotations

import operator
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from lbr_ds.cli.app import JsonFile, Overrides, Recipe, Stage
from lbr_ds.errors import ConfigError
from lbr_ds.system.atomic import write_json
from lbr_ds.system.failures import check_writable, writing

if TYPE_CHECKING:
    from lbr_ds.config import RunConfig


class _Suites(TyperGroup):
    """`bench cluster` is a command of its own; any other word is the name of a suite."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Insert the command `suite` before a word that is no command."""
        if args and args[0] not in self.commands:
            return "suite", self.commands["suite"], args
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=_Suites,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    subcommand_metavar="SUITE [ARGS]...",
    help="Run a benchmark suite of this program (gpu, loader), or benchmark a cluster.",
)


@bench.command()
def suite(
    suite: Annotated[str, typer.Argument(help="gpu or loader.")],
    out: JsonFile = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Records (.jsonl, .jsonl.gz) or a prepared folder; default: the demo's."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short version, to see it run.")] = False,
) -> None:
    """Run a benchmark suite and compare it with its targets. The word `suite` may be left out.

    Example: `lbr-ds bench loader --quick --json loader.json`
    """
    from lbr_ds.bench import as_result, run_suite

    if out is not None:
        check_writable(out)
    with writing(tempfile.gettempdir()):
        result = as_result(suite, run_suite(suite, data=data, quick=quick))
    show_bench(result)
    if out is not None:
        with writing(out):
            write_json(out, result)
        typer.echo(f"written to {out}")


Ranks = Annotated[
    str, typer.Option(help="Numbers of ranks: 1,2,4; default: 1, 2, 4 ... up to this machine's.")
]
Tokens = Annotated[
    str, typer.Option(help="Values of micro_batch_tokens: 4096,8192; default: the recipe's.")
]
DsConfigs = Annotated[
    str, typer.Option(help="Names or files of ds_configs: zero3,zero2; default: the recipe's.")
]
Scaling = Annotated[
    str,
    typer.Option(help="weak (the same samples per rank), strong (the same per step), or both."),
]
Steps = Annotated[int, typer.Option(min=2, help="Timed steps of each configuration.")]
SweepFolder = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="A folder; default: bench-NAME-stageN. An unfinished sweep in it is resumed.",
    ),
]
Gpu = Annotated[
    str, typer.Option(help="For MFU and the plan, as in `plan --gpu`; default: by its name.")
]
Launcher = Annotated[
    str,
    typer.Option(help="Command that starts {ranks} ranks, {per_node} on each of {nodes} nodes."),
]
PerNode = Annotated[int, typer.Option(min=1, help="With --launcher: ranks of a full node.")]


@bench.command()
def cluster(
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Stage = 1,
    ranks: Ranks = "",
    tokens: Tokens = "",
    ds_configs: DsConfigs = "",
    scaling: Scaling = "weak,strong",
    steps: Steps = 5,
    out: SweepFolder = None,
    gpu: Gpu = "",
    launcher: Launcher = "",
    per_node: PerNode = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat failed configurations.")] = False,
    row: Annotated[Path | None, typer.Option(hidden=True)] = None,
    network: Annotated[bool, typer.Option("--network", hidden=True)] = False,
    nproc: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure speed, memory and traffic for ranks x micro-batch x ds_config, next to the plan.

    Each configuration runs in its own processes. One that fails becomes a row with its reason, and
    repeating the command resumes the sweep at the first missing row. On SLURM:
    `sbatch slurm/benchmark.sbatch`.

    Example: `lbr-ds bench cluster demo --ranks 1,2 --tokens 1024,2048 --out bench-demo`
    """
    from lbr_ds.cluster.benchmark import Sweep, default_ranks, run_sweep
    from lbr_ds.cluster.benchmark.table import markdown
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    if row is not None:
        return _measure_row(run, stage, row, steps, network, nproc)
    folder = out or Path(f"bench-{run.name}-stage{stage}")
    sweep = Sweep(
        recipe,
        stage,
        _counts("--ranks", ranks) or default_ranks(),
        folder,
        overrides=tuple(overrides or ()),
        tokens=_counts("--tokens", tokens),
        layouts=_comma_separated(ds_configs),
        scaling=_comma_separated(scaling),
        steps=steps,
        launcher=launcher,
        per_node=per_node,
        gpu=gpu,
    )
    with writing(folder):
        typer.echo(markdown(run_sweep(sweep, retry=retry)))
    typer.echo(f"written to {folder}: RESULT.md, result.png, result.json")


def _measure_row(
    run: RunConfig, stage: int, row: Path, steps: int, network: bool, nproc: int | None
) -> None:
    """Measure one configuration, as one of the ranks or by launching `nproc` of them here."""
    from lbr_ds.distributed import launched_ranks

    if nproc is not None and not launched_ranks():
        from lbr_ds.training.launch import launch

        raise typer.Exit(launch(sys.argv[1:], nproc))
    from lbr_ds.cluster.benchmark.rank import measure_network, measure_training

    if network:
        measure_network(run, row)
    else:
        measure_training(run, stage, row, steps)


def _comma_separated(text: str) -> tuple[str, ...]:
    """Return the values of an option, without blanks."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _counts(option: str, text: str) -> tuple[int, ...]:
    """Return the values of an option as whole numbers. Raises ConfigError unless they are >= 1."""
    for word in _comma_separated(text):
        if not word.isdigit() or int(word) < 1:
            raise ConfigError(f"{option} {text}: {word!r} is not a whole number of 1 or more")
    return tuple(int(word) for word in _comma_separated(text))


def show_bench(result: dict[str, Any]) -> None:
    """Print the rows of a suite, each value next to its required value and its goal."""
    promised = any(row["theory"] is not None for row in result["rows"])
    names = ["measure", "value", "quartiles", *(["theory"] if promised else []), "must", "goal", ""]
    # Without a frame and with quartiles only where there are rounds it fits 80 columns.
    table = Table(
        *(Column(name, no_wrap=True) for name in names),
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for row in result["rows"]:
        sign = ">=" if row["better"] == "higher" else "<="
        low, high = row["quartiles"]
        theory = "" if row["theory"] is None else f"{row['theory']:.3g}"
        measured = row["value"] is not None
        table.add_row(
            row["measure"],
            f"{row['value']:.3g}" if measured else "-",
            f"{low:.3g}..{high:.3g}" if measured and row["rounds"] > 1 else "",
            *([theory] if promised else []),
            f"{sign}{row['floor']:.3g}",
            f"{sign}{row['goal']:.3g}",
            _mark(row),
        )
    console = Console()
    console.print(table)
    for row in result["rows"]:
        about = f"{row['measure']}: {row['about']}; {row['rounds']} round(s)"
        console.print(about, style="dim", highlight=False, markup=False, soft_wrap=True)


def _mark(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    better = operator.ge if row["better"] == "higher" else operator.le
    if better(row["value"], row["goal"]):
        return "goal"
    return "must" if better(row["value"], row["floor"]) else "miss"
