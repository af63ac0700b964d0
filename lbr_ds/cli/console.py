"""Tables of the command line: dicts in, a terminal's lines out."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

_SAMPLES = (4, 3, 3, 3)  # records of gl, cl, eval and control that are shown


def show_curation(curation: dict[str, Any], folder: Path) -> None:
    """What `prepare` made, for a person to judge: sizes, lengths, drops, samples, leaks."""
    console = Console()
    table = Table("split", "records", "groups", "query p50 / p99", "passage p50 / p99")
    for name, split in curation["splits"].items():
        lengths = [split["characters"].get(part) for part in ("query", "positives")]
        cells = [f"{c['p50']} / {c['p99']}" if c else "-" for c in lengths]
        table.add_row(name, str(split["records"]), str(split["groups"]), *cells)
    console.print(table)
    tied, groups = curation["components"], curation["groups"]
    console.print(
        f"lengths are in characters; {tied['largest']} records at most are tied into one split, "
        f"{groups['largest']} at most are one group",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    for kind in ("dropped_records", "dropped_texts"):
        for rule, found in curation[kind].items():
            console.print(f"{kind.replace('_', ' ')}, {rule}: {found['count']}", highlight=False)
    for (name, split), number in zip(curation["splits"].items(), _SAMPLES, strict=False):
        for sample in split["samples"][:number]:
            shown = sample.get("query") or sample.get("text", "")
            answer = " ".join((sample.get("positives") or [""])[0].split())
            line = f"{name}: {shown[:70]} -> {answer}"
            console.print(line, highlight=False, markup=False, no_wrap=True, overflow="ellipsis")
    if "entities" in curation:
        _show_entities(console, curation["entities"], curation["told_in_gl"])
    leaks = curation["leaks"]
    reused = " (reused: nothing has changed)" if curation["reused"] else ""
    console.print(
        f"texts shared between eval and gl: {leaks['eval_gl']}, and cl: {leaks['eval_cl']}; "
        f"nearly: {leaks['near_eval_gl']}, {leaks['near_eval_cl']}\n"
        f"written to {folder}{reused}; the whole account is in {folder / 'curation.json'}",
        highlight=False,
        soft_wrap=True,
    )


def _show_entities(console: Console, entities: dict[str, int], told: dict[str, int]) -> None:
    """The knowledge split: how many entities stand where."""
    console.print(
        f"knowledge split: entities asked for in stage 2 {entities['cl']}, held out "
        f"{entities['eval']}, control {entities['control']}; gl has facts of {entities['gl']}, "
        f"{entities['gl_facts_only']} of them without pairs\n"
        f"of eval {told['near_queries']} queries and {told['near_passages']} passages stand in gl, "
        "equal or nearly, as facts of their own entity (no leak here)",
        highlight=False,
        soft_wrap=True,
    )


def show_mining(audit: dict[str, Any], folder: Path, used: int) -> None:
    """What `mine` kept and dropped, with examples; `used`: the recipe's stage2.num_negatives."""
    console = Console()
    table = Table("candidates", "count")
    table.add_row("seen", str(audit["candidates_seen"]))
    table.add_row("kept as negatives", str(audit["kept"]))
    for reason, count in audit["dropped"].items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", str(count))
    console.print(table)
    for example in audit["examples"]:
        for part in ("query", "positive", "negative"):
            line = f"{part:>8}: {example[part][:100]}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"          {example['method']} rank {example['rank']}, score {example['score']}, "
            f"{example['ratio']} of the positive's",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    short, none = audit["queries_left_short"], audit["queries_with_none"]
    reused = " (reused: nothing has changed)" if audit["reused"] else ""
    console.print(
        f"{audit['queries']} queries over {audit['passages']} passages; {short} have fewer than "
        f"{audit['settings']['keep']} negatives, {none} of them none\n"
        f"written to {folder}{reused}; the whole account is in {folder / 'mining.json'}\n"
        f"training uses stage2.num_negatives={used} of them a record",
        highlight=False,
        soft_wrap=True,
    )


def show_scores(result: dict[str, Any]) -> None:
    """The tables that `eval` prints."""
    table = Table("task", "R@10", "N@10", "separation", "queries", "passages")
    for name, score in result["tasks"].items():
        figures = [
            score.get("recall_at_10"),
            score.get("ndcg_at_10", score.get("main_score")),
            score.get("separation_ratio"),
        ]
        cells = ["-" if f is None else f"{f:.4f}" for f in figures]
        table.add_row(name, *cells, str(score["queries"]), str(score["documents"]))
    console = Console()
    console.print(table)
    if "protocol" in result:
        console.print(result["protocol"], highlight=False)
    if "generation" in result:
        written = Table("answers written from", "BLEU-4", "ROUGE-L", "chrF", "words")
        for prompt, score in result["generation"]["prompts"].items():
            known = (score[key] for key in ("bleu_4", "rouge_l", "chrf"))
            figures = ["-" if figure is None else f"{figure:.2f}" for figure in known]
            written.add_row(prompt, *figures, f"{score['words']:.1f}")
        console.print(written)
    if "states" in result:
        _show_states(console, result["states"])


def _show_states(console: Console, rows: list[dict[str, Any]]) -> None:
    """R@10 and Separation Ratio by layer, a pair of columns for each reading."""
    reads = list(dict.fromkeys(row["read"] for row in rows))
    heads = (head for read in reads for head in (f"{read}\nR@10", "\nseparation"))
    table = Table("\nlayer", *heads, box=None)  # without a frame it fits 80 columns
    best = max(rows, key=operator.itemgetter("recall_at_10"))
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = []
        for row in (r for r in rows if r["layer"] == layer):
            ratio = row["separation_ratio"]  # None: all passages coincide
            figures = [f"{row['recall_at_10']:.4f}", "-" if ratio is None else f"{ratio:.3f}"]
            cells += [f"[bold]{f}[/bold]" if row is best else f for f in figures]
        table.add_row(str(layer), *cells)
    console.print(table)


def show_bench(result: dict[str, Any]) -> None:
    """The table that `bench` prints: each figure beside what must be and what is aimed at."""
    promised = any(row["theory"] is not None for row in result["rows"])
    names = ["measure", "value", "quartiles", *(["theory"] if promised else []), "must", "goal", ""]
    # Without a frame and with quartiles only where there are rounds it fits 80 columns.
    table = Table(
        *(Column(name, no_wrap=True) for name in names),
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for row in result["rows"]:
        sign = ">=" if row["better"] == "higher" else "<="
        low, high = row["quartiles"]
        theory = "" if row["theory"] is None else f"{row['theory']:.3g}"
        measured = row["value"] is not None
        table.add_row(
            row["measure"],
            f"{row['value']:.3g}" if measured else "-",
            f"{low:.3g}..{high:.3g}" if measured and row["rounds"] > 1 else "",
            *([theory] if promised else []),
            f"{sign}{row['floor']:.3g}",
            f"{sign}{row['goal']:.3g}",
            _mark(row),
        )
    console = Console()
    console.print(table)
    for row in result["rows"]:
        about = f"{row['measure']}: {row['about']}; {row['rounds']} round(s)"
        console.print(about, style="dim", highlight=False, markup=False, soft_wrap=True)


def _mark(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    better = operator.ge if row["better"] == "higher" else operator.le
    if better(row["value"], row["goal"]):
        return "goal"
    return "must" if better(row["value"], row["floor"]) else "miss"
