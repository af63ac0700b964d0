"""A figure is written as PNG, or as a page that holds the same image."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from lbr_ds.system.plots import new_figure, save_figure


def test_png_and_html_hold_one_image(tmp_path: Path) -> None:
    figure, grid = new_figure(4, 3, rows=2, columns=3)
    assert grid.shape == (2, 3)
    grid[1, 2].plot([1, 2], [3, 4])
    for name in ("plot.png", "plot.html"):
        save_figure(figure, tmp_path / name)
    image = (tmp_path / "plot.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    (source,) = re.findall(r"base64,([^']+)'", (tmp_path / "plot.html").read_text())
    assert base64.b64decode(source) == image
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.html", "plot.png"]
