"""The program and what its verbs have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from lbr_ds import __version__

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
