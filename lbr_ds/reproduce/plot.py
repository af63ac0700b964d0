"""Draw result.png: N@10 of each variant with its interval, or N@10 over shares of the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lbr_ds.reproduce.paper import PAPER
from lbr_ds.reproduce.tables import Table
from lbr_ds.system.plots import COLORS, new_figure, save_figure

_OURS, *_PAPER = COLORS
_UNTRAINED, _CONTROL = "#b9c4cc", "#e3c48d"


def plot_result(result: dict[str, Any], table: Table, path: Path) -> None:
    """Write the plot of a result to `path`; nothing when no variant has a score."""
    lines = {line["variant"]: line for line in result["summary"]}
    if not lines:
        return
    shares = [variant for variant in table.variants if variant.share is not None]
    figure = _shares(lines, shares) if shares else _bars(result["table"], lines, table)
    axes = figure.axes[0]
    axes.set_title(f"{result['title']}\n{result['recipe']}", fontsize=10, loc="left")
    figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=2)
    save_figure(figure, path)


def _bars(name: str, lines: dict[str, Any], table: Table) -> Figure:
    """Draw a bar for each variant, a thin one below it for the control, and the paper's N@10.

    The paper's figures are diamonds, one color for each of its N@10 columns.
    """
    variants = [variant for variant in table.variants if variant.name in lines]
    figure, grid = new_figure(7, 1.7 + 0.42 * len(variants))
    axes = grid[0, 0]
    for place, variant in enumerate(variants):
        line = lines[variant.name]
        mean = line["ndcg_at_10"]["mean"]
        low, high = line["ndcg_interval"] or (mean, mean)
        axes.barh(
            place,
            mean,
            0.6,
            color=_OURS if variant.stages else _UNTRAINED,
            xerr=[[max(0, mean - low)], [max(0, high - mean)]],
            ecolor="#222222",
            capsize=3,
            error_kw={"linewidth": 1},
        )
    axes.barh([0], [0], color=_OURS, label="this recipe (95 % interval over queries)")
    controls = [(n, lines[v.name].get("control_ndcg_at_10")) for n, v in enumerate(variants)]
    known = [(place + 0.4, line["mean"]) for place, line in controls if line]
    if known:
        places, means = zip(*known, strict=True)
        axes.barh(places, means, 0.2, color=_CONTROL, label="control: facts in no training split")
    paper = PAPER[name]
    for column, color in zip(paper.ndcg, _PAPER, strict=False):
        figures = [paper.scores(variant.paper).get(column) for variant in variants]
        marks = [(x, y) for y, x in enumerate(figures) if x is not None]
        if marks:
            x, y = zip(*marks, strict=True)
            axes.scatter(
                x,
                y,
                marker="D",
                s=24,
                facecolor="white",
                edgecolor=color,
                zorder=3,
                label=f"paper, {column} (other data)",
            )
    axes.set_yticks(range(len(variants)), [variant.name for variant in variants])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("N@10")
    return figure


def _shares(lines: dict[str, Any], variants: list[Any]) -> Figure:
    """Draw a curve for each kind of variant over the share of the budget used in stage 1."""
    figure, grid = new_figure(6, 4)
    axes = grid[0, 0]
    kinds = dict.fromkeys(variant.name.split(",")[0] for variant in variants)
    for kind, color in zip(kinds, (_PAPER[0], _OURS), strict=True):
        own = [v for v in variants if v.name.split(",")[0] == kind and v.name in lines]
        means = [lines[v.name]["ndcg_at_10"]["mean"] for v in own]
        bounds = [lines[v.name]["ndcg_interval"] or (m, m) for v, m in zip(own, means, strict=True)]
        axes.plot([v.share for v in own], means, "o-", color=color, label=kind)
        low, high = zip(*bounds, strict=True)
        axes.fill_between([v.share for v in own], low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("share of the records in stage 1")
    axes.set_ylabel("N@10")
    return figure
