"""The program and what its verbs have in common."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lbr_ds import __version__
from lbr_ds.errors import ConfigError

if TYPE_CHECKING:
    from lbr_ds.distributed import World

app = typer.Typer(
    help="Learn Before Represent: a causal LLM becomes the embedding model of one domain.",
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

Sharing = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Ranks here that share the encoding.")
]


def as_ranks(nproc: int | None, timeout_minutes: float) -> World:
    """This process's place among the ranks that a launcher has started, or --nproc of this verb.

    The process that starts those does not come back: it ends with their code. Raises ConfigError
    when a launcher has started another number of ranks than --nproc says.
    """
    from lbr_ds.distributed import ALONE, join, launched_ranks

    ranks = launched_ranks()
    if not ranks:
        if nproc in (None, 1):
            return ALONE
        from lbr_ds.train.launch import launch

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
