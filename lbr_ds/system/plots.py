"""Figures in one style, written as PNG or HTML; without a display.

matplotlib is imported with this module, so import it where a plot is drawn.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lbr_ds.system.atomic import atomic_file, write_text

COLORS = ("#2f6f9f", "#c2571a", "#3c8a4e", "#7a4fa3", "#8a8d91", "#b8860b")
_DPI = 150


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, NDArray[np.object_]]:
    """Return a figure of this size in inches and its axes, a (rows, columns) array."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid: NDArray[np.object_] = figure.subplots(rows, columns, squeeze=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, or as an HTML page for a `.html` path; in full or not at all."""
    if path.suffix != ".html":
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=_DPI)
        return
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DPI)
    source = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
    title = escape(path.stem)
    write_text(
        path,
        f"<!doctype html><meta charset=utf-8><title>{title}</title>"
        f"<img alt='{title}' style='max-width:100%' src='{source}'>\n",
    )
