"""`lbr-ds config`: show a resolved recipe, or the reference of all its keys."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from lbr_ds.cli.app import Overrides
from lbr_ds.errors import ConfigError

if TYPE_CHECKING:
    from lbr_ds.config.reference import Key


def config(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe: a YAML file, or the name of a shipped one, such as demo."),
    ] = None,
    overrides: Overrides = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference", help="Print all recipe keys with their meaning, type and default."
        ),
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference of all keys as Markdown.")
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", help="Print the JSON schema of recipes, with which editors check them."
        ),
    ] = False,
) -> None:
    """Print a recipe with all defaults and overrides applied, or the reference of all keys.

    Secrets in URLs are left out, as in the run folder. `--reference` prints a table on a terminal,
    and Markdown into a file or a pipe.

    Example: `lbr-ds config demo stage1.num_steps=10`
    """
    if sum((recipe is not None, reference or markdown, schema)) != 1:
        raise ConfigError("give a recipe, or one of --reference, --markdown and --schema")
    if recipe is not None:
        from lbr_ds.config import load

        typer.echo(load(recipe, overrides or []).dump(), nl=False)
        return
    from lbr_ds.config import reference as all_keys

    if schema:
        typer.echo(all_keys.schema_text(), nl=False)
    elif markdown or not sys.stdout.isatty():
        typer.echo(all_keys.markdown(), nl=False)
    else:
        _show(all_keys.keys())


def _show(keys: Iterable[Key]) -> None:
    """Print the reference as a table: a section's name and purpose, then its keys."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("key", overflow="fold"), "meaning", box=None, pad_edge=False)
    for key in keys:
        if key.is_section:
            table.add_row()
            table.add_row(f"[bold]{escape(key.name)}[/]", f"[bold]{escape(key.meaning)}[/]")
            continue
        default = f"default: {key.default}" if key.default else "required"
        facts = escape(f"{key.type.replace('`', '')}; {default}")
        table.add_row(escape(key.name), f"{escape(key.meaning)}\n[dim]{facts}[/]")
    Console(highlight=False).print(table)
