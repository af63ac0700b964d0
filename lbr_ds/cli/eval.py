"""`lbr-ds eval`: retrieval scores of a model."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lbr_ds.cli.app import CheckpointChoice, EncodingRanks, MaxQueries, join_or_launch
from lbr_ds.errors import ConfigError
from lbr_ds.system.failures import check_writable, writing

_TIMEOUT_MINUTES = 30  # how long ranks of `eval` wait for each other

Model = Annotated[
    str,
    typer.Argument(
        help="The model: a run, a checkpoint or a model folder; bm25; or the name of a model that "
        "MTEB or the Hugging Face hub knows."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="Prepared data, a folder or a URL: score the model on its held-out split."),
]
General = Annotated[
    str | None,
    typer.Option(
        help="Prepared data outside the domain: also score the model on its held-out split."
    ),
]
Tasks = Annotated[str, typer.Option(help="Comma-separated names of MTEB tasks or benchmarks.")]
Output = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Result file (JSON). Default: RUN/eval/STAGE.json for a run, else MODEL.json in the "
        "working directory.",
    ),
]
Examples = Annotated[
    int,
    typer.Option(min=0, help="Number of queries to report with the passages that the model finds."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")
]
AllowOverlap = Annotated[
    bool,
    typer.Option(
        "--allow-overlap",
        help="Score the model even on texts that it was trained on, and report how many there are.",
    ),
]
Generation = Annotated[
    bool,
    typer.Option(
        "--generation",
        help="Also generate answers and score them by BLEU-4, chrF and ROUGE-L (lbr-ds models).",
    ),
]
States = Annotated[
    bool,
    typer.Option(
        "--states",
        help="Also score retrieval with the hidden states of every layer, pooled in several ways "
        "(lbr-ds models).",
    ),
]
Instructed = Annotated[
    bool,
    typer.Option(
        "--instructed",
        help="Use the instructions of the data also with models that lbr-ds did not train.",
    ),
]
InstructionsOf = Annotated[
    str,
    typer.Option(
        help="With --tasks: the source of the training data whose instructions an lbr-ds model "
        "uses."
    ),
]

Dimensions = Annotated[
    str,
    typer.Option(
        help="Also score the vectors of --data truncated to these lengths, such as 256,128. "
        "Default: the lengths that the model was trained for (stage2.matryoshka)."
    ),
]
Quantized = Annotated[
    bool,
    typer.Option(
        "--quantized", help="Also score the vectors of --data quantised to int8 and to binary."
    ),
]
Bottleneck = Annotated[
    str,
    typer.Option(
        help="Also score --data with fewer bottleneck tokens: a comma-separated list of counts, "
        "such as 1,2,4."
    ),
]


def evaluate(
    model: Model,
    data: Data = None,
    general: General = None,
    tasks: Tasks = "",
    out: Output = None,
    max_queries: MaxQueries = None,
    examples: Examples = 5,
    trust_remote_code: TrustRemoteCode = False,
    allow_overlap: AllowOverlap = False,
    generation: Generation = False,
    states: States = False,
    instructed: Instructed = False,
    instructions_of: InstructionsOf = "",
    checkpoint: CheckpointChoice = "best",
    dimensions: Dimensions = "",
    quantized: Quantized = False,
    bottleneck: Bottleneck = "",
    nproc: EncodingRanks = None,
) -> None:
    """Score a model's retrieval with MTEB, on the held-out split or on official tasks.

    The scores of an exported folder are also written into its model card.

    Example: `lbr-ds eval runs/demo --data data/icd10cm`
    """
    check_start(model, data, general)
    import lbr_ds.evaluation as evaluation
    from lbr_ds.evaluation.baselines import check_ranks

    check_ranks(model, nproc or 1)
    world = join_or_launch(nproc, _TIMEOUT_MINUTES)
    output = check_writable(out or _default_output(model))
    with writing(output):
        result = evaluation.evaluate(
            model,
            data=data,
            general=general,
            tasks=evaluation.split_names(tasks),
            output=output,
            options=evaluation.EvalOptions(
                max_queries=max_queries,
                examples=examples,
                trust_remote_code=trust_remote_code,
                allow_overlap=allow_overlap,
                generation=generation,
                states=states,
                instructed=instructed,
                instructions_of=instructions_of,
                checkpoint=checkpoint,
                dimensions=_numbers(dimensions),
                quantized=quantized,
                bottleneck=_numbers(bottleneck, "bottleneck") or (),
            ),
            world=world,
        )
    if world.first:
        show_scores(result)
        _report_files(Path(model).expanduser(), output, result)


def check_start(model: str, *data: str | None) -> None:
    """Check what can be checked before torch and mteb are imported, which takes seconds.

    Raises:
        ConfigError: the model's folder is missing or holds no model.
        CheckpointError: the model is damaged.
        DataError: the data folder is missing or not prepared.
    """
    from lbr_ds import runs
    from lbr_ds.evaluation.judgements import manifest_of

    runs.resolve_model(model)
    for place in data:
        if place is not None:
            manifest_of(place)


def _numbers(text: str, option: str = "dimensions") -> tuple[int, ...] | None:
    """Return the whole numbers of a comma-separated list; None for an empty one."""
    if not text:
        return None
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        example = {"dimensions": "of components, as 256,128", "bottleneck": "of tokens, as 1,2,4"}
        raise ConfigError(f"--{option} {text!r}: give numbers {example[option]}")
    return found


def _report_files(folder: Path, output: Path, result: dict[str, Any]) -> None:
    """Print where the scores are; write those of an exported folder into its model card too."""
    typer.echo(f"written to {output}")
    if (folder / "parity.json").is_file():
        from lbr_ds.exporting.card import add_scores

        add_scores(folder, result)


def _default_output(model: str) -> Path:
    from lbr_ds import runs

    found = runs.resolve_model(model)
    run = runs.run_of(Path(model)) if found.ours else None
    if run is None or found.folder is None:
        return Path(Path(model).name + ".json")
    stage = next((p.name for p in found.folder.parents if p.name[:5] == "stage"), "")
    return run / "eval" / f"{stage or 'base'}.json"


def show_scores(result: dict[str, Any]) -> None:
    """Print the scores by task, generation and states."""
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
    for name, score in result["tasks"].items():
        _show_by_source(console, name, score.get("by_source", {}))
        if score.get("compressed"):
            _show_compressed(console, name, score["compressed"])
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
    if "bottleneck" in result:
        counted = Table("bottleneck tokens", "R@10", "N@10")
        for row in result["bottleneck"]:
            both = (f"{row[key]:.4f}" for key in ("recall_at_10", "ndcg_at_10"))
            counted.add_row(str(row["bottleneck"]), *both)
        console.print(counted)


def _show_by_source(console: Console, task: str, parts: dict[str, dict[str, Any]]) -> None:
    """Print the scores of the queries of each source, if there are several."""
    if not parts:
        return
    table = Table("source", "R@10", "N@10", "queries", title=f"{task}: by source")
    for source, score in parts.items():
        figures = (f"{score[key]:.4f}" for key in ("recall_at_10", "ndcg_at_10"))
        table.add_row(source, *figures, f"{score['queries']:,}")
    console.print(table)


def _show_compressed(console: Console, task: str, rows: list[dict[str, Any]]) -> None:
    """Print the scores of truncated and quantised vectors."""
    heads = ("dimensions", "precision", "bytes", "R@10", "N@10")
    table = Table(*heads, title=f"{task}: truncated and quantised vectors")
    for row in rows:
        scores = (f"{row[key]:.4f}" for key in ("recall_at_10", "ndcg_at_10"))
        table.add_row(str(row["dimensions"]), row["precision"], f"{row['bytes']:,}", *scores)
    console.print(table)


def _show_states(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print R@10 and Separation Ratio by layer, with two columns for each pooling."""
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
