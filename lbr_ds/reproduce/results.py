"""Collect the scores of a table's jobs, compare its variants, and write RESULT.md."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lbr_ds.config import CONTROL, RunConfig
from lbr_ds.evaluation import bootstrap, geometry
from lbr_ds.reproduce.jobs import Job
from lbr_ds.reproduce.paper import PAPER, PaperTable
from lbr_ds.reproduce.tables import Table, Variant
from lbr_ds.runs import checkpoints
from lbr_ds.system.tables import markdown_table

MEASURES = ("recall_at_10", "ndcg_at_10", *geometry.MEASURES)
WRITTEN = {"bleu_4": "B-4", "rouge_l": "R-L", "chrf": "chrF"}  # measures of answers, and headings


@dataclass(frozen=True)
class TableRow:
    """A variant with one seed and its jobs; seed None: a model of others, which is not trained."""

    variant: Variant
    seed: int | None
    jobs: list[Job]


def collect(
    name: str, table: Table, rows: list[TableRow], run: RunConfig, root: Path, notes: list[str]
) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        name: The table.
        table: Its variants and the pairs to compare.
        rows: Each variant with each seed.
        run: The recipe.
        root: RUN/reproduce.
        notes: Why variants have no scores, such as models of others that cannot be loaded.

    Returns:
        {"table", "title", "recipe", "backbone", "protocol", "data", "rows", "summary",
        "comparisons", "control", "separation_predicts", "notes"}.

        - "rows": the scores of each variant and seed.
        - "summary": for each variant {measure: {"mean", "spread"}} over its seeds (spread: the
          standard deviation, None for one seed), and the 95 % interval of N@10 over the queries.
        - "comparisons": for each pair a minus b in N@10, paired over queries; a query's score is
          averaged over seeds.
        - "control": empty, or under protocol knowledge the comparisons on the control set, each
          with "beyond": how much more a gains over b on the held-out queries
          (`bootstrap.compare_gains`). Rows and summary then have `control_*` measures.
    """
    made, sizes = [], {}
    scored: dict[str, dict[str, list[dict[str, float]]]] = {"eval": {}, CONTROL: {}}
    for row in rows:
        if not row.jobs[-1].scores.is_file():
            continue
        evaluation = json.loads(row.jobs[-1].scores.read_text(encoding="utf-8"))
        tasks = dict(zip(scored, evaluation["tasks"].items(), strict=False))  # control is second
        made.append(_row(row, [scores for _, scores in tasks.values()], evaluation))
        for kind, (task, _) in tasks.items():
            own = scored[kind].setdefault(row.variant.name, [])
            own.append(evaluation["per_query"][task])
        sizes = {k: tasks["eval"][1][k] for k in ("queries", "documents")}
        if CONTROL in tasks:
            sizes["control_queries"] = tasks[CONTROL][1]["queries"]
    averaged, control = ({v: _average(own) for v, own in part.items()} for part in scored.values())
    return {
        "table": name,
        "title": PAPER[name].title,
        "recipe": run.name,
        "backbone": run.model.backbone,
        "protocol": f"{'knowledge' if control else 'random'} split",
        "data": {"folder": str(run.data.folder), **sizes},
        "rows": made,
        "summary": _summary(table, made, averaged),
        "comparisons": _comparisons(table, averaged),
        "control": _controls(table, averaged, control),
        "separation_predicts": separation_predicts(root / "runs"),
        "notes": notes,
    }


def _row(row: TableRow, scores: list[dict[str, Any]], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return one of "rows"; scores: of the held-out task, and of the control if there is one."""
    values: dict[str, Any] = {"variant": row.variant.name, "seed": row.seed}
    for prefix, own in zip(("", "control_"), scores, strict=False):
        values |= {f"{prefix}{measure}": own.get(measure) for measure in MEASURES}
    generation = evaluation.get("generation")
    if generation:
        for prompt, written in generation["prompts"].items():
            values |= {f"{k}_{prompt}": written.get(k) for k in WRITTEN}
    stage1 = [job for job in row.jobs if job.phase == 1]
    if stage1:
        values["stage1_seconds"] = _stage1_seconds(stage1[0].folder / "stage1" / "metrics.jsonl")
    return {**values, "folder": str(row.jobs[-1].folder)}


def _stage1_seconds(metrics: Path) -> float:
    """Return the median time of a step times their number, so that pauses count less."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    middle = statistics.median(s["step_seconds"] for s in steps)
    return round(middle * max(s["step"] for s in steps), 3)


def _average(seeds: list[dict[str, float]]) -> dict[str, float]:
    """Return each query's mean over the seeds."""
    return {i: statistics.fmean(own[i] for own in seeds) for i in seeds[0]}


def _summary(
    table: Table, rows: list[dict[str, Any]], averaged: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    summary: list[dict[str, Any]] = []
    for variant in table.variants:
        own = [row for row in rows if row["variant"] == variant.name]
        if not own:
            continue
        line: dict[str, Any] = {"variant": variant.name, "seeds": len(own)}
        for measure in own[0]:
            values = [row[measure] for row in own if isinstance(row[measure], float)]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                line[measure] = {"mean": statistics.fmean(values), "spread": spread}
        bounds = bootstrap.interval(averaged[variant.name])
        line["ndcg_interval"] = list(bounds) if bounds else None
        summary.append(line)
    return summary


def _comparisons(table: Table, averaged: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    made = []
    for a, b in table.pairs:
        if a in averaged and b in averaged:
            found = bootstrap.compare(averaged[a], averaged[b])
            if found is not None:
                made.append({"a": a, "b": b, **asdict(found)})
    return made


def _controls(
    table: Table, held_out: dict[str, dict[str, float]], control: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Return the comparisons on the control set, each with "beyond"."""
    made = _comparisons(table, control)
    for c in made:
        ours, theirs = ((scores[c["a"]], scores[c["b"]]) for scores in (held_out, control))
        beyond = bootstrap.compare_gains(ours, theirs)
        c["beyond"] = asdict(beyond) if beyond else None
    return made


def separation_predicts(folder: Path) -> dict[str, Any]:
    """Return the rank correlation of the Separation Ratio after stage 1 and N@10 after stage 2.

    Over all runs below `folder` that have both, as {"runs": their number, "spearman"}; "spearman"
    is None for fewer than three runs or when either value is the same in all of them.
    """
    points = []
    for after in sorted(folder.glob("stage2-*/eval/stage2.json")):
        place = after.parent.parent
        before = (place / "stage1").resolve().parent / "eval" / "stage1.json"
        if checkpoints(place / "stage1") and before.is_file():
            first, second = (
                next(iter(json.loads(p.read_text())["tasks"].values())) for p in (before, after)
            )
            points.append((first.get("separation_ratio"), second["ndcg_at_10"]))
    known = np.array([p for p in points if p[0] is not None], float).reshape(-1, 2)
    spearman = None
    if len(known) > 2 and all(len(set(column)) > 1 for column in known.T):
        spearman = float(np.corrcoef(_ranks(known[:, 0]), _ranks(known[:, 1]))[0, 1])
    return {"runs": len(known), "spearman": spearman}


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share the mean of their ranks."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def render(result: dict[str, Any], table: Table) -> str:
    """Return RESULT.md: the rows beside the paper's, the comparisons, the paper's other rows."""
    paper = PAPER[result["table"]]
    columns = _columns(result, table)
    variants = {variant.name: variant for variant in table.variants}
    rows = []
    for line in result["summary"]:
        cells = [_cell(line, measure, result, variants) for measure in columns.values()]
        rows.append(
            [line["variant"], *cells, *_paper_figures(paper, variants[line["variant"]].paper)]
        )
    seeds = max((line["seeds"] for line in result["summary"]), default=0)
    data = result["data"]
    parts = [
        f"# {result['table']}: {result['title']}",
        f"Recipe {result['recipe']}, {result['protocol']}, backbone {result['backbone']}; "
        f"{data.get('queries')} held-out queries {_and_control(data)}among {data.get('documents')} "
        f"passages of {data['folder']}; {seeds} seed(s). "
        "In brackets: the 95 % interval over queries; after +-: the standard deviation over seeds.",
        f"```\n{result['command']}\n```",
        markdown_table(["variant", *columns, *(f"paper: {c}" for c in paper.columns)], rows),
    ]
    if result["comparisons"]:
        parts.append(_compared(result["comparisons"]))
    if result["control"]:
        parts.append(_compared_control(result["control"]))
    parts.append(_predicts(result["separation_predicts"]))
    parts += [f"- {note}" for note in result["notes"]]
    parts.append(f"The paper's figures are from other data and backbones. {paper.note}")
    beside = {variants[line["variant"]].paper for line in result["summary"]}
    others = [name for name in paper.rows if name not in beside]
    if others:
        rows = [[name, *_paper_figures(paper, name)] for name in others]
        parts.append(markdown_table(["the paper's other rows", *paper.columns], rows))
    return "\n\n".join(parts) + "\n"


def _columns(result: dict[str, Any], table: Table) -> dict[str, str]:
    """Return {heading: measure} of what these rows have."""
    columns = {"R@10": "recall_at_10", "N@10": "ndcg_at_10", "separation": "separation_ratio"}
    if "control_queries" in result["data"]:
        columns |= {"control R@10": "control_recall_at_10", "control N@10": "control_ndcg_at_10"}
    if table.generation:
        columns |= {
            f"{short}, {context}": f"{measure}_{prompt}"
            for prompt, context in (("visible", "X seen"), ("bottleneck", "B alone"))
            for measure, short in WRITTEN.items()
        }
    if any(variant.over for variant in table.variants):
        columns["time"] = "stage1_seconds"
    return columns


def _cell(
    line: dict[str, Any], measure: str, result: dict[str, Any], variants: dict[str, Variant]
) -> str:
    """Return the mean, the interval of N@10 and the spread over seeds; time as a ratio."""
    if measure not in line:
        return ""
    mean, spread = line[measure]["mean"], line[measure]["spread"]
    if measure == "stage1_seconds":
        over = variants[line["variant"]].over
        base = next(s for s in result["summary"] if s["variant"] == over)[measure]["mean"]
        return f"{mean / base:.2f}"
    text = f"{mean:.2f}" if measure.startswith(tuple(WRITTEN)) else f"{mean:.3f}"
    if measure == "ndcg_at_10" and line["ndcg_interval"]:
        low, high = line["ndcg_interval"]
        text += f" [{low:.3f}, {high:.3f}]"
    return text if spread is None else f"{text} +- {spread:.3f}"


def _and_control(data: dict[str, Any]) -> str:
    return f"and {data['control_queries']} of the control " if "control_queries" in data else ""


def _compared_control(comparisons: list[dict[str, Any]]) -> str:
    measures = ["difference", "95 % interval", "p"]
    rows = []
    for c in comparisons:
        figures = [_difference(part) for part in (c, c["beyond"]) if part]
        rows.append([f"{c['a']} over {c['b']}", *(cell for own in figures for cell in own)])
    head = ["N@10 on the control set", *measures, "held-out beyond control", *measures[1:]]
    return markdown_table(head, rows)


def _difference(c: dict[str, Any]) -> list[str]:
    return [f"{c['difference']:+.3f}", f"{c['low']:+.3f} to {c['high']:+.3f}", f"{c['p']:.4f}"]


def _compared(comparisons: list[dict[str, Any]]) -> str:
    rows = [[f"{c['a']} over {c['b']}", *_difference(c)] for c in comparisons]
    return markdown_table(["N@10, paired over queries", "difference", "95 % interval", "p"], rows)


def _predicts(result: dict[str, Any]) -> str:
    start = "Separation Ratio after stage 1 against N@10 after stage 2"
    if result["spearman"] is None:
        return f"{start}: {result['runs']} run(s), too few or too alike for a rank correlation."
    return f"{start}: rank correlation {result['spearman']:.2f} over {result['runs']} runs."


def _paper_figures(paper: PaperTable, row: str) -> list[str]:
    """Return the paper's figures of a row, "" where it has none."""
    scores = paper.scores(row)
    return [f"{scores[column]:.4g}" if column in scores else "" for column in paper.columns]
