"""The program, and the arguments and options that several verbs share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lbr_ds import __version__
from lbr_ds.errors import ConfigError

if TYPE_CHECKING:
    from lbr_ds.distributed import World

app = typer.Typer(
    help="Learn Before Represent: turn a causal LLM into the embedding model of one domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[str, typer.Argument(help="A recipe: a YAML file, or a shipped name (demo).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Override recipe keys.")
]
Stage = Annotated[
    int, typer.Option(min=1, max=2, help="1: generative (IB-GL). 2: contrastive (GR-CL).")
]
EncodingRanks = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Ranks on this machine that encode texts.")
]
MaxQueries = Annotated[
    int | None, typer.Option(min=1, help="Use a random sample of the held-out queries (seeded).")
]
CheckpointChoice = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        help="Which checkpoint of a run or a stage: best (by held-out figures of its training: "
        "nDCG@10 in stage 2, Separation Ratio in stage 1), last, or a step.",
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", dir_okay=False, help="Also write the result to this file.")
]


def join_or_launch(nproc: int | None, timeout_minutes: float) -> World:
    """Return this process's place among the ranks of a launcher, or launch `nproc` ranks.

    A process that launches ranks does not return: it exits with their exit code.

    Raises:
        ConfigError: a launcher has started another number of ranks than --nproc says.
    """
    from lbr_ds.distributed import ALONE, join, launched_ranks

    ranks = launched_ranks()
    if not ranks:
        if nproc in (None, 1):
            return ALONE
        from lbr_ds.training.launch import launch

        raise typer.Exit(launch(sys.argv[1:], nproc))
    if nproc not in (None, ranks):  # before they meet: one that leaves would break the meeting
        raise ConfigError(
            f"--nproc {nproc}: a launcher has started {ranks} ranks already; leave it out"
        )
    return join(timeout_minutes)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lbr-ds {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only options of the program itself."""
