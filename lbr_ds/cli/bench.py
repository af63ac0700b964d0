"""`lbr-ds bench`: benchmark suites of this program, and of a cluster."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from lbr_ds.bench import SUITES, find_suite, show_number, verdict
from lbr_ds.cli.app import JsonFile, Overrides, Recipe, Stage
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.system.failures import check_writable, writing

if TYPE_CHECKING:
    from lbr_ds.config import RunConfig


class _Suites(TyperGroup):
    """Names the nearest suite when a word is not the name of one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command; an unknown one is an error with a hint."""
        if args and args[0] not in self.commands:
            find_suite(args[0])
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=_Suites,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    subcommand_metavar="SUITE [ARGS]...",
    help=f"Run a benchmark suite of this program ({', '.join(SUITES)}), or benchmark a cluster.",
)

Rows = Annotated[
    list[str] | None,
    typer.Option("--row", help="Measure only this row. Repeat the option for more rows."),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Time budget in minutes, from the start of the command. Rows that would not end in "
        "time are left out.",
    ),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        help="Folder of prepared data. Default: the demo's data for loader, random texts for gpu; "
        "host uses no data."
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of timed rounds of a row (host: twice as many). Default: 7; quick: 2."
    ),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Use tiny sizes, also on a CPU, to test that every row runs. The values mean nothing.",
    ),
]
ListRows = Annotated[
    bool, typer.Option("--list", help="List the rows with their targets and exit.")
]


def _suite_command(name: str) -> Callable[..., None]:
    """Return the command `lbr-ds bench NAME`."""

    def command(
        rows: Rows = None,
        minutes: Minutes = None,
        out: JsonFile = None,
        data: Texts = None,
        rounds: Rounds = None,
        quick: Quick = False,
        list_rows: ListRows = False,
    ) -> None:
        if list_rows:
            return _list_rows(name)
        from lbr_ds.bench import run_suite

        find_suite(name).chosen(rows or ())
        if out is not None:
            check_writable(out)
        with writing(out or tempfile.gettempdir()):
            result = run_suite(
                name,
                rows=rows or (),
                minutes=minutes,
                data=data,
                quick=quick,
                rounds=rounds,
                out=out,
            )
        show_bench(result)
        if out is not None:
            typer.echo(f"written to {out}")
        _report_missing(name, result)

    suite = SUITES[name]
    first = suite.targets[0].measure
    command.__doc__ = f"""{suite.about}

    Each row is printed, and written to the file of `--json`, as soon as it is measured. Rows that
    the file already has from this machine and version are kept unless they are measured again, so
    a suite can be run in several calls.

    Rows: {", ".join(target.measure for target in suite.targets)}.

    Example: `lbr-ds bench {name} --row {first} --minutes 4 --json {name}.json`
    """
    return command


for _name in SUITES:
    bench.command(_name)(_suite_command(_name))


def _list_rows(name: str) -> None:
    """Print the rows of a suite with their targets."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("row", "must", "goal", "about s", "what"):
        table.add_column(column, no_wrap=column != "what")
    for target in find_suite(name).targets:
        sign = ">=" if target.better == "higher" else "<="
        bounds = (f"{sign}{show_number(value)}" for value in (target.floor, target.goal))
        table.add_row(target.measure, *bounds, f"{target.seconds:.0f}", target.about)
    Console().print(table)


def _report_missing(name: str, result: dict[str, Any]) -> None:
    """Name the rows left out. Raises EnvironmentProblem if rows could not be measured."""
    if left := result["left_out"]:
        again = " ".join(f"--row {row}" for row in left)
        typer.echo(
            f"rows left out for lack of time; measure them with: lbr-ds bench {name} {again}"
        )
    if failed := [row["measure"] for row in result["rows"] if row["value"] is None]:
        raise EnvironmentProblem(
            f"{len(failed)} row(s) could not be measured: {', '.join(failed)}; the reasons are "
            "above and in the result"
        )


Ranks = Annotated[
    str,
    typer.Option(
        help="Comma-separated numbers of ranks, such as 1,2,4. Default: 1, 2, 4, ... up to the "
        "number of GPUs of this machine (without a GPU: of cores, at most 4)."
    ),
]
Tokens = Annotated[
    str,
    typer.Option(
        help="Comma-separated values of micro_batch_tokens, such as 4096,8192. Default: the value "
        "of the recipe."
    ),
]
DsConfigs = Annotated[
    str,
    typer.Option(
        help="Comma-separated names or files of ds_configs, such as zero3,zero2. Default: the one "
        "of the recipe."
    ),
]
Scaling = Annotated[
    str,
    typer.Option(
        help="weak (a fixed number of samples per rank), strong (a fixed number per step), or both."
    ),
]
Steps = Annotated[int, typer.Option(min=2, help="Number of timed steps per configuration.")]
SweepFolder = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Output folder. An unfinished sweep in it is resumed. Default: bench-NAME-stageN, "
        "with the recipe's name.",
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        help="Type of GPU, as in `plan --gpu`, for MFU and the plan. Default: recognised from the "
        "name of the device."
    ),
]
Launcher = Annotated[
    str,
    typer.Option(
        help="Command that starts the ranks. It may contain {ranks} (their number), {nodes}, "
        "{per_node} (ranks on each node) and {log} (a prefix for log files). Default: the ranks "
        "run on this machine."
    ),
]
PerNode = Annotated[int, typer.Option(min=1, help="With --launcher: ranks on a full node.")]


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
    retry: Annotated[
        bool, typer.Option("--retry", help="Also repeat the configurations that failed.")
    ] = False,
    row: Annotated[Path | None, typer.Option(hidden=True)] = None,
    network: Annotated[bool, typer.Option("--network", hidden=True)] = False,
    nproc: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure speed, memory and traffic for each number of ranks, micro-batch and ds_config.

    Every combination of these is a configuration. It runs in its own processes and gives one row,
    next to the prediction of `lbr-ds plan`. A configuration that fails gives a row with the reason.
    The same command resumes an unfinished sweep at the first missing row. On SLURM, use
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
            show_number(row["value"]) if measured else "-",
            f"{show_number(low)}..{show_number(high)}" if measured and row["rounds"] > 1 else "",
            *([theory] if promised else []),
            f"{sign}{show_number(row['floor'])}",
            f"{sign}{show_number(row['goal'])}",
            verdict(row, bool(result.get("quick"))),
        )
    console = Console()
    console.print(table)
    for row in result["rows"]:
        about = f"{row['measure']}: {row['about']}; {row['rounds']} round(s)"
        console.print(about, style="dim", highlight=False, markup=False, soft_wrap=True)
