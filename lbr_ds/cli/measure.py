"""The verb that measures: `bench SUITE` for this program, `bench cluster` for a cluster."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from lbr_ds.cli.app import Overrides, Recipe, app
from lbr_ds.errors import ConfigError
from lbr_ds.system.atomic import write_json
from lbr_ds.system.failures import check_writable, writing

if TYPE_CHECKING:
    from lbr_ds.config import RunConfig


class _Suites(TyperGroup):
    """`bench cluster` is a command of its own; any other word is the name of a suite."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Typer's own, but for a word that is no command."""
        if args and args[0] not in self.commands:
            return "suite", self.commands["suite"], args
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=_Suites,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    subcommand_metavar="SUITE [ARGS]...",
    help="Measured figures: of the program (the word `suite` may be left out), or of a cluster.",
)
app.add_typer(bench, name="bench")
SweepFolder = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="A folder; default: bench-NAME-stageN. An unfinished sweep in it is resumed.",
    ),
]


@bench.command()
def suite(
    suite: Annotated[
        str,
        typer.Argument(help="gpu or loader."),
    ],
    out: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the rows here.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Records (.jsonl, .jsonl.gz) or a prepared folder; default: the demo's."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short version, to see it run.")] = False,
) -> None:
    """Run a benchmark suite and compare its rows with their targets.

    Example: `lbr-ds bench loader --quick --json loader.json`
    """
    from lbr_ds.bench import as_result, run_suite
    from lbr_ds.cli.console import show_bench

    if out is not None:
        check_writable(out)
    with writing(tempfile.gettempdir()):
        result = as_result(suite, run_suite(suite, data=data, quick=quick))
    show_bench(result)
    if out is not None:
        with writing(out):
            write_json(out, result)
        typer.echo(f"written to {out}")


@bench.command()
def cluster(
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="Of training.")] = 1,
    ranks: Annotated[
        str, typer.Option(help="1,2,4: how many take part; default: 1, 2, 4 ... this machine's.")
    ] = "",
    tokens: Annotated[
        str, typer.Option(help="4096,8192: micro_batch_tokens; default: the recipe's.")
    ] = "",
    ds_configs: Annotated[
        str, typer.Option(help="zero3,zero2: names or files; default: the recipe's.")
    ] = "",
    scaling: Annotated[
        str, typer.Option(help="weak (as many samples a rank), strong (a step), or both.")
    ] = "weak,strong",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of a row.")] = 5,
    out: SweepFolder = None,
    gpu: Annotated[
        str, typer.Option(help="For MFU and plan, as `plan --gpu`; default: by its name.")
    ] = "",
    launcher: Annotated[
        str, typer.Option(help="Starts {ranks} ranks, {per_node} on each of {nodes} nodes.")
    ] = "",
    per_node: Annotated[
        int, typer.Option(min=1, help="With --launcher: ranks of a full node.")
    ] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Take failed rows again.")] = False,
    row: Annotated[Path | None, typer.Option(hidden=True)] = None,
    network: Annotated[bool, typer.Option("--network", hidden=True)] = False,
    nproc: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Tokens/s, MFU, memory, waiting and traffic: ranks x micro-batch x ds_config, beside the plan.

    Each configuration runs in processes of its own; one that fails is a row with its reason, and a
    sweep that is given again goes on at the first row that is missing. On SLURM:
    `sbatch slurm/benchmark.sbatch`.

    Example: `lbr-ds bench cluster demo --ranks 1,2 --tokens 1024,2048 --out bench-demo`
    """
    from lbr_ds.cluster.benchmark import Sweep, default_ranks, run_sweep
    from lbr_ds.cluster.benchmark.table import markdown
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    if row is not None:
        return _as_rank(run, stage, row, steps, network, nproc)
    folder = out or Path(f"bench-{run.name}-stage{stage}")
    sweep = Sweep(
        recipe,
        stage,
        _counts("--ranks", ranks) or default_ranks(),
        folder,
        overrides=tuple(overrides or ()),
        tokens=_counts("--tokens", tokens),
        layouts=_words(ds_configs),
        scaling=_words(scaling),
        steps=steps,
        launcher=launcher,
        per_node=per_node,
        gpu=gpu,
    )
    with writing(folder):
        typer.echo(markdown(run_sweep(sweep, retry=retry)))
    typer.echo(f"written to {folder}: RESULT.md, result.png, result.json")


def _as_rank(
    run: RunConfig, stage: int, row: Path, steps: int, network: bool, nproc: int | None
) -> None:
    """What the driver's command does: measure one configuration, as a rank or with `nproc` here."""
    from lbr_ds.distributed import launched_ranks

    if nproc is not None and not launched_ranks():
        from lbr_ds.train.launch import launch

        raise typer.Exit(launch(sys.argv[1:], nproc))
    from lbr_ds.cluster.benchmark.rank import measure_network, measure_training

    if network:
        measure_network(run, row)
    else:
        measure_training(run, stage, row, steps)


def _words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _counts(option: str, text: str) -> tuple[int, ...]:
    """The same as whole numbers of 1 or more."""
    for word in _words(text):
        if not word.isdigit() or int(word) < 1:
            raise ConfigError(f"{option} {text}: {word!r} is no whole number of 1 or more")
    return tuple(int(word) for word in _words(text))
