"""Render a report as HTML and Markdown, by the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import lbr_ds
from lbr_ds.report.collect import Run
from lbr_ds.report.compare import LABELS, METRICS, PAPER
from lbr_ds.report.curves import MAX_SERIES, draw_stage
from lbr_ds.system.markdown import template_environment

STAGES = {
    "1": ("Stage 1", "IB-GL: learn the domain through the bottleneck"),
    "2": ("Stage 2", "GR-CL: align the bottleneck's states contrastively"),
}
CURVES = {
    "loss": "Loss",
    "accuracy": "In-batch accuracy",
    "positive_cosine": "Cosine, right answer",
    "negative_cosine": "Cosine, other passages",
    "grad_norm": "Gradient norm",
}


def render_html(report: dict[str, Any], runs: list[Run]) -> str:
    """Return one HTML page with style and curves, without scripts and outside requests."""
    curves = []
    for number, (name, meaning) in STAGES.items():
        panels = draw_stage(runs[:MAX_SERIES], int(number))
        for panel in panels:
            panel["svg"] = Markup(panel["svg"])  # made by us: its only text is numbers
        starts = [
            stage.start for run in runs for stage in run.stages if stage.number == int(number)
        ]
        if panels:
            if len(runs) == 1 and starts[0]:
                meaning += f"; started from {starts[0]}"
            curves.append({"name": name, "meaning": meaning, "panels": panels})
    style = Markup(_environment().get_template("style.css").render())
    return (
        _environment()
        .get_template("report.html")
        .render(report=report, curves=curves, style=style, **_shared())
    )


def render_markdown(report: dict[str, Any]) -> str:
    """Return the tables of the report as GitHub-flavoured Markdown."""
    text = _environment(markdown=True).get_template("report.md").render(report=report, **_shared())
    return text.strip() + "\n"


def _shared() -> dict[str, Any]:
    return {
        "labels": LABELS,
        "metrics": METRICS,
        "paper": PAPER,
        "stage_names": STAGES,
        "curve_names": CURVES,
        "max_series": MAX_SERIES,
        "version": lbr_ds.__version__,
    }


def _environment(markdown: bool = False) -> Environment:
    """For HTML or for Markdown; in both, values are escaped unless a template says otherwise."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    options: dict[str, Any] = {"undefined": StrictUndefined, "lstrip_blocks": True}
    if markdown:
        templates = template_environment(loader, **options)
    else:
        templates = Environment(loader=loader, autoescape=True, trim_blocks=True, **options)
    templates.filters |= {
        "score": score,
        "gain": gain,
        "count": count,
        "clock": clock,
        "brief": brief,
        "facts": facts,
        "headline": headline,
        "short": short,
        "ndcg": ndcg,
    }
    return templates


def score(value: float | None) -> str:
    """0.4137 -> 0.414; nothing -> an en dash."""
    return "\u2013" if value is None else f"{value:.3f}"


def gain(value: float | None) -> str:
    """0.1 -> +0.100, with a true minus sign."""
    return "" if value is None else f"{value:+.3f}".replace("-", "\u2212")


def count(value: float | None) -> str:
    """12345 -> 12,345."""
    return "\u2013" if value is None else f"{value:,.0f}"


def clock(seconds: float | None) -> str:
    """3725 -> 1 h 2 min."""
    if seconds is None:
        return "\u2013"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def short(value: float | None) -> str:
    """Three significant digits, or an en dash."""
    return "\u2013" if value is None else f"{value:.3g}"


def brief(text: str, limit: int = 260) -> str:
    """One paragraph of at most `limit` characters, cut at a word."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    return text[:limit].rsplit(" ", 1)[0] + " \u2026"


def facts(value: Any, limit: int = 40) -> list[tuple[str, str]]:
    """Flatten a nested dict to (dotted name, text) rows; long lists are counted, None omitted."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, inner: Any) -> None:
        if isinstance(inner, dict):
            for key, deeper in inner.items():
                walk(f"{prefix}.{key}" if prefix else str(key), deeper)
        elif isinstance(inner, list):
            flat = all(isinstance(item, (str, int, float)) for item in inner) and len(inner) <= 6
            shown = ", ".join(map(str, inner)) if flat else f"{len(inner)} entries"
            rows.append((prefix, brief(shown, 120)))
        elif inner is None:
            return
        elif isinstance(inner, bool):
            rows.append((prefix, "yes" if inner else "no"))
        elif isinstance(inner, int) and abs(inner) >= 10_000:
            rows.append((prefix, f"{inner:,}"))
        else:
            rows.append((prefix, brief(str(inner).partition("#sha256=")[0], 120)))

    walk("", value)
    return rows[:limit]


def ndcg(table: dict[str, Any], key: str) -> float | None:
    """nDCG@10 of one model in a retrieval table."""
    return next((row["ndcg_at_10"] for row in table["rows"] if row["key"] == key), None)


def headline(run: dict[str, Any]) -> str:
    """Summarise a run in one sentence: how the score on held-out queries changed."""
    if not run["retrieval"]:
        steps = [f"stage {n}: {s['steps']:,} steps" for n, s in run["stages"].items()]
        return "Not evaluated yet" + (f" ({'; '.join(steps)})." if steps else ".")
    table = run["retrieval"][0]
    rows = {row["key"]: row for row in table["rows"] if row["recall_at_10"] is not None}
    queries, documents = count(table["queries"]), count(table["documents"])
    where = f"on {queries} held-out queries over {documents} passages"
    if not rows:
        return f"Evaluated {where}."
    last = list(rows.values())[-1]
    if "base" in rows and last is not rows["base"]:
        before, after = rows["base"]["recall_at_10"], last["recall_at_10"]
        verb = "rose" if after > before else "fell" if after < before else "stayed"
        label = last["label"][0].lower() + last["label"][1:]
        return f"Recall@10 {verb} from {score(before)} to {score(after)} {label}, {where}."
    return f"Recall@10 of {score(last['recall_at_10'])} {where}."
