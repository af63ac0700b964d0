"""Write a table as Markdown or to a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1
) -> str:
    """Return a table in Markdown.

    Args:
        columns: The headings.
        rows: The cells of each row, written as they are: `markdown.escape` text of others.
        text_columns: How many of the first columns hold text, aligned left; the others are numbers.
    """
    numbers = len(columns) - text_columns
    lines = [columns, ["---"] * text_columns + ["--:"] * numbers, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    title: str | None = None,
    frame: bool = True,
) -> None:
    """Print a table to standard output, as wide as the terminal allows.

    Args:
        columns: The headings; they are not wrapped.
        rows: The cells of each row; `[bold]...[/bold]` and other markup of rich is applied.
        text_columns: How many of the first columns hold text, aligned left; the others are numbers.
        title: A line above the table.
        frame: Whether to draw lines; a wide table fits without them.
    """
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    headings = [
        Column(name, justify="left" if place < text_columns else "right", no_wrap=True)
        for place, name in enumerate(columns)
    ]
    table = Table(*headings, title=title, box=HEAVY_HEAD if frame else None, pad_edge=frame)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
