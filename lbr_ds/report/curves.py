"""Draw metrics of runs as small SVG panels that take colors and font from the page.

matplotlib draws with marker colours; they are then replaced by CSS variables, so that one drawing
serves light screens, dark screens and paper. Text stays text.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lbr_ds.report.by_source import sources_of
from lbr_ds.report.collect import Run, Stage

MAX_SERIES = 6  # colours in the palette that stay apart for colour-blind eyes
_MAX_POINTS = 600  # a screen does not show more, and the file would grow with the run
_INK, _GRID = "#101112", "#202122"
_SERIES = [f"#a0a0{n:02x}" for n in range(MAX_SERIES)]
_VARIABLES = {_INK: "var(--soft)", _GRID: "var(--rule)"}
_VARIABLES |= {color: f"var(--series-{n})" for n, color in enumerate(_SERIES, 1)}

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "xtick.major.width": 0.6,
}


@dataclass(frozen=True)
class Panel:
    """One small chart: its measures, and a note for the reader."""

    title: str
    keys: tuple[str, ...]
    stages: tuple[int, ...] = (1, 2)
    note: str = ""
    names: tuple[str, ...] = ()  # labels of the lines where there are several measures
    from_zero: bool = False
    log: bool = False


PANELS = (
    Panel("Loss", ("loss",)),
    Panel("Generative loss", ("generative_loss",), (2,), "of the replayed batches of stage 1"),
    Panel("Distillation loss", ("distillation_loss",), (2,), "of the teacher's scores or vectors"),
    Panel("In-batch accuracy", ("accuracy",), (2,), "share of queries whose answer ranks first"),
    Panel(
        "Cosine to the query",
        ("positive_cosine", "negative_cosine"),
        (2,),
        "",
        ("right answer", "other passages"),
    ),
    Panel(
        "Held-out retrieval",
        ("evaluation/recall_at_10", "evaluation/ndcg_at_10"),
        note="on a sample, during training",
        names=("R@10", "N@10"),
    ),
    Panel("Separation Ratio", ("evaluation/separation_ratio",), note="held out; 1 means none"),
    Panel(
        "Held-out loss",
        ("evaluation/loss", "evaluation/loss_without_bottleneck"),
        note="the gap is what Y reads from B",
        names=("as trained", "B hidden from Y"),
    ),
    Panel("Alignment", ("evaluation/alignment",), note="held out; 0 if pairs coincide"),
    Panel("Uniformity", ("evaluation/uniformity",), note="held out; 0 means collapse"),
    Panel("Effective rank", ("evaluation/effective_rank",), note="held out; 1 means collapse"),
    Panel("Gradient norm", ("grad_norm",), note="before clipping", log=True),
    Panel("Learning rate", ("lr",), from_zero=True),
    Panel("Throughput", ("tokens_per_second",), note="tokens per second", from_zero=True),
    Panel("Memory", ("memory_gib",), (1,), "GiB, peak of a rank", from_zero=True),
    Panel("Waiting for data", ("data_wait_seconds",), (1,), "seconds per step", from_zero=True),
)


def draw_stage(runs: list[Run], number: int) -> list[dict[str, Any]]:
    """Return the panels of one stage that have data: [{"title", "note", "lines", "svg"}].

    lines: [{"name", "color"}] for a legend where a panel shows several measures of one run.
    """
    stages = [(n, s) for n, run in enumerate(runs) for s in run.stages if s.number == number]
    panels = []
    by_source = _by_source(stages[0][1]) if len(runs) == 1 and stages else ()
    for panel in (*PANELS, *by_source):
        shown = [(n, s) for n, s in stages if any(s.has(key) for key in panel.keys)]
        if number in panel.stages and shown:
            panels.append(
                {
                    "title": panel.title,
                    "note": panel.note,
                    "lines": _legend(panel, len(runs) > 1),
                    "svg": _draw(panel, shown, several=len(runs) > 1, salt=f"s{number}"),
                }
            )
    return panels


def _by_source(stage: Stage) -> list[Panel]:
    """Return the panels of measures by source; of more than MAX_SERIES sources the first ones."""
    names = tuple(sources_of(stage)[:MAX_SERIES])
    titles = {"loss": "Loss by source", "accuracy": "In-batch accuracy by source"}
    return [
        Panel(title, tuple(f"{key}/{name}" for name in names), names=names)
        for key, title in titles.items()
        if names
    ]


def _legend(panel: Panel, several: bool) -> list[dict[str, str]]:
    """Return a panel's legend: colors, or dashes where colors distinguish runs."""
    if several and panel.names:
        words = zip(("solid", "dashed"), panel.names, strict=True)
        return [{"name": "; ".join(f"{dash}: {name}" for dash, name in words), "color": ""}]
    names = enumerate(panel.names, 1)
    return [{"name": name, "color": f"var(--series-{n})"} for n, name in names]


def _draw(panel: Panel, shown: list[tuple[int, Stage]], several: bool, salt: str) -> str:
    """Return one panel as an `<svg>` element."""
    style: Any = {**_STYLE, "svg.hashsalt": salt + panel.title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.5, 1.9), layout="constrained")
        axes = figure.subplots()
        for place, stage in shown:
            for measure, key in enumerate(panel.keys):
                color = _SERIES[(place if several else measure) % MAX_SERIES]
                dash = "--" if several and measure else "-"
                _line(axes, stage, key, color, dash)
        _scale(axes, panel)
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _for_the_page(file.getvalue(), panel.title)


def _line(axes: Any, stage: Stage, key: str, color: str, dash: str) -> None:
    """Draw the values; if there are many, draw them faintly under their running mean."""
    steps, values = (np.asarray(part) for part in stage.series(key))
    if "/" in key and not key.startswith("evaluation/"):  # a step may have no sample of a source
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(steps):
        return
    steps, values = _thin(steps, values)
    smooth = _running_mean(values)
    if smooth is None or key == "lr":
        marker = "o" if len(values) < 20 else ""
        axes.plot(steps, values, dash, color=color, linewidth=1.4, marker=marker, markersize=2.5)
        return
    axes.plot(steps, values, dash, color=color, linewidth=0.7, alpha=0.3)
    axes.plot(steps, smooth, dash, color=color, linewidth=1.6)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most _MAX_POINTS means of neighbours; NaN for a group without a finite value."""
    if len(steps) <= _MAX_POINTS:
        return steps, np.where(np.isfinite(values), values, np.nan)
    groups = np.array_split(np.arange(len(steps)), _MAX_POINTS)
    means = []
    for group in groups:
        finite = values[group][np.isfinite(values[group])]
        means.append(finite.mean() if len(finite) else np.nan)
    return np.array([steps[group[-1]] for group in groups]), np.array(means)


def _running_mean(values: np.ndarray) -> np.ndarray | None:
    """Return the mean over a centred window of a twentieth of the curve; None if it is short."""
    if len(values) < 40:
        return None
    width = max(3, len(values) // 20) | 1
    finite = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    count = np.convolve(finite.astype(float), kernel, "same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(finite, total / count, np.nan)


def _scale(axes: Any, panel: Panel) -> None:
    """Set few ticks with short numbers; the axis begins at zero where the panel says so."""
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # A norm spans less than two decades, mostly: powers of ten alone would leave one tick.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _short(value: float, _: Any = None) -> str:
    """1234567 -> 1.23M, 0.00012 -> 1.2e-4, 0.5 -> 0.5."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            divisor = 1e3 if letter == "k" else limit
            return f"{value / divisor:.3g}{letter}"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def _for_the_page(svg: str, title: str) -> str:
    """Return the `<svg>` element with CSS variables for colours and the fonts of the page."""
    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{title}">{body.strip()}'
