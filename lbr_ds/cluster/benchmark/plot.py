"""Plot a sweep's rows: rate, scaling efficiency, the parts of a step's time, bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lbr_ds.system.atomic import atomic_file

_COLOURS = ("#0b6e4f", "#2f6f9f", "#c2571a", "#7a4fa3", "#8a8d91", "#b8860b")
_MARKS = {"weak": ("o", "-"), "strong": ("s", "--")}


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the figure; nothing if no row was measured."""
    rows = [r for r in result["rows"] if r["figures"]]
    training = [r for r in rows if r["kind"] == "training"]
    if not rows:
        return
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    _against_ranks(axes[0][0], training, "value")
    axes[0][0].set_ylabel("tokens/s per rank (diamond: planned)")
    _against_ranks(axes[0][1], training, None)
    axes[0][1].axhline(1, color="#222222", linewidth=0.8)
    axes[0][1].set_ylabel("efficiency over the fewest ranks")
    _shares(axes[1][0], training)
    _bandwidth(axes[1][1], [r for r in rows if r["kind"] == "network"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    settings = result["settings"]
    device = rows[0]["figures"]["device"]
    figure.suptitle(f"{settings['recipe']}, stage {settings['stage']}, {device}", fontsize=11)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150)


def _against_ranks(axis: Axes, rows: list[dict[str, Any]], key: str | None) -> None:
    """Draw a line for each layout, micro-batch and scaling. key: of a row; None: the efficiency."""
    kinds = list(dict.fromkeys((r["ds_config"], r["micro_batch_tokens"]) for r in rows))
    for colour, kind in zip(_COLOURS * len(kinds), kinds, strict=False):
        own = [r for r in rows if (r["ds_config"], r["micro_batch_tokens"]) == kind]
        for way, (mark, style) in _MARKS.items():
            line = [r for r in own if r[way] is not None]
            if way == "weak" and not line and all(r["strong"] is None for r in own):
                line = own  # one number of ranks
            line = _one_line(line, way)
            ys = [r[key] if key else r[way] for r in line]
            points = [(r["ranks"], y) for r, y in zip(line, ys, strict=True) if y is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker=mark,
                    linestyle=style,
                    color=colour,
                    markersize=5,
                    label=f"{kind[0]}, {kind[1]} tokens, {way}",
                )
            planned = [
                (r["ranks"], r["planned"]["tokens_per_second_per_rank"])
                for r in line
                if key and r["planned"]
            ]
            if planned:
                xs, rates = zip(*planned, strict=True)
                axis.scatter(
                    xs, rates, s=28, marker="D", facecolor="white", edgecolor=colour, zorder=3
                )
    ranks = sorted({r["ranks"] for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(n) for n in ranks])
    axis.minorticks_off()
    axis.set_xlabel("ranks")
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.legend(fontsize=8, frameon=False)


def _one_line(rows: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """Among rows with several numbers of samples return those with the most common one."""

    def alike(row: dict[str, Any]) -> float:
        return row["samples"] / row["ranks"] if way == "weak" else row["samples"]

    groups: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(alike(row), []).append(row)
    best = max(groups.values(), key=len, default=[])
    return sorted(best, key=lambda r: r["ranks"])


def _shares(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw a bar for each row: exposed and hidden collectives, data wait, the rest."""
    names = []
    for place, row in enumerate(rows):
        figures = row["figures"]
        exposed = figures["exposed_share"]
        behind = max(0.0, figures["collective_share"] - exposed)
        wait = figures["data_wait_share"]
        parts = [
            (exposed, _COLOURS[2], "collectives alone"),
            (behind, "#f0c9b0", "collectives beside computation"),
            (wait, _COLOURS[1], "waiting for data"),
            (max(0.0, 1 - exposed - behind - wait), "#dfe4e2", "the rest"),
        ]
        left = 0.0
        for share, colour, label in parts:
            axis.barh(place, share, 0.7, left, color=colour, label=label if not place else None)
            left += share
        names.append(
            f"{row['ranks']} x {row['micro_batch_tokens']}, {row['samples']}, {row['ds_config']}"
        )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of a step (ranks x tokens, samples, layout)")
    if rows:
        axis.legend(
            fontsize=8,
            frameon=False,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=4,
            columnspacing=0.8,
            handlelength=1,
        )


def _bandwidth(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """GB/s over the size of the whole, a colour for each number of ranks."""
    for colour, row in zip(_COLOURS * len(rows), rows, strict=False):
        for name, style in (("all_gather", "-"), ("reduce_scatter", "--")):
            own = [f for f in row["figures"]["collectives"] if f["collective"] == name]
            axis.plot(
                [f["bytes"] / 2**20 for f in own],
                [f["gb_per_second"] for f in own],
                style,
                marker="o",
                markersize=4,
                color=colour,
                label=f"{row['ranks']} ranks, {name.replace('_', '-')}",
            )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("MiB of the whole")
    axis.set_ylabel("GB/s that a rank receives")
    axis.set_ylim(bottom=0)
    if rows:
        axis.legend(fontsize=8, frameon=False)
