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
    help="Learn Before Represent (LBR): train a causal LLM into an embedding model for one domain. "
    "The usual order: prepare, train --stage 1, train --stage 2, eval, export. Each command has an "
    "example in its own --help.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[
    str, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one, such as demo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.SUB=VALUE",
        help="Override keys of the recipe, such as stage1.num_steps=50.",
    ),
]
Stage = Annotated[
    int,
    typer.Option(
        min=1,
        max=2,
        help="1: generative training (IB-GL in the paper). 2: contrastive training (GR-CL).",
    ),
]
EncodingRanks = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Number of ranks on this machine that share the work of the model. Default: 1.",
    ),
]
MaxQueries = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Score a random sample of this many held-out queries, drawn by a fixed seed. "
        "Default: all.",
    ),
]
CheckpointChoice = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        help="Checkpoint of a run or a stage: best, last, or the number of a step. best is the one "
        "with the highest held-out score in training: nDCG@10 in stage 2, the Separation Ratio in "
        "stage 1.",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", dir_okay=False, help="Also write the result to this file, as JSON."),
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
            f"--nproc {nproc}: a launcher has already started {ranks} ranks; leave --nproc out"
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
