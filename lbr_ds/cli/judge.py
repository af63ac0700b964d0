"""Verbs that judge: what a cluster must have, whether a host is fit, how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lbr_ds.cli.app import Overrides, Recipe, Sharing, app, as_ranks
from lbr_ds.system.failures import check_writable, writing

_TIMEOUT_MINUTES = 30  # that ranks of `eval` wait for each other
Instructed = Annotated[
    bool,
    typer.Option(
        "--instructed",
        help="Give the data's instructions also to models that lbr-ds did not train.",
    ),
]


@app.command()
def plan(
    recipe: Recipe,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each node.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str,
        typer.Option(help="h100, h200, b200, ... or a YAML file (lbr_ds/cluster/plan/gpus.yaml)."),
    ] = "h100",
    network: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s to other nodes, per GPU and direction.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The backbone's config.json, where it is not found.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the plan here.")
    ] = None,
) -> None:
    """Memory, traffic and time of both stages on a cluster, before any GPU is asked for.

    Example: `lbr-ds plan huatuo-7b --nodes 4 --gpus 8 --gpu h100`
    """
    from lbr_ds.cluster.plan import Cluster, find_gpu, make_plan
    from lbr_ds.cluster.plan.table import show_plan, write
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    if out is not None:
        check_writable(out)
    result = make_plan(run, Cluster(nodes, gpus, find_gpu(gpu, network)), config)
    show_plan(result, recipe)
    with writing(out or "standard output"):
        write(result, out)


@app.command()
def doctor(
    recipe: Recipe,
    overrides: Overrides = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="Of training.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that take part.")] = 1,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each node; default: one per GPU.")
    ] = None,
) -> None:
    """Whether this host can do its part of a run: data, room, memory, GPUs. For one node alone.

    Example: `lbr-ds doctor demo --stage 1 --nproc 2`
    """
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    import torch

    from lbr_ds.cluster.doctor import Duty, examine

    ranks = nproc or max(1, torch.cuda.device_count())
    typer.echo(examine(Duty(run, stage, nodes, ranks)))


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A folder, run or checkpoint, bm25, or a name that MTEB knows.")
    ],
    data: Annotated[
        str | None, typer.Option(help="A prepared folder or its URL: score on its held-out split.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="MTEB tasks or benchmarks, comma-separated.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="JSON; default: RUN/eval/STAGE.json, or MODEL.json here."
        ),
    ] = None,
    max_queries: Annotated[
        int | None, typer.Option(min=1, help="A seeded sample of the held-out queries.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Queries shown with their passages.")] = 5,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a model run code of its own.")
    ] = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Score on texts that the model was trained on.")
    ] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Also BLEU-4 and ROUGE-L of written answers.")
    ] = False,
    states: Annotated[
        bool, typer.Option("--states", help="Also retrieval by layer and by pooling.")
    ] = False,
    instructed: Instructed = False,
    instructions_of: Annotated[
        str, typer.Option(help="For --tasks: the source whose instructions an lbr-ds model uses.")
    ] = "",
    nproc: Sharing = None,
) -> None:
    """Score retrieval by MTEB, on the held-out split or official tasks; fills an export's card.

    Example: `lbr-ds eval runs/demo --data data/icd10cm`
    """
    import lbr_ds.evaluate as judged
    from lbr_ds.cli.console import show_scores
    from lbr_ds.evaluate.baselines import check_ranks

    check_ranks(model, nproc or 1)
    world = as_ranks(nproc, _TIMEOUT_MINUTES)
    output = check_writable(out or _default_output(model))
    with writing(output):
        result = judged.evaluate(
            model,
            data=data,
            tasks=judged.split_names(tasks),
            output=output,
            options=judged.EvalOptions(
                max_queries=max_queries,
                examples=examples,
                trust_remote_code=trust_remote_code,
                allow_overlap=allow_overlap,
                generation=generation,
                states=states,
                instructed=instructed,
                instructions_of=instructions_of,
            ),
            world=world,
        )
    if world.first:
        show_scores(result)
        _report_files(Path(model).expanduser(), output, result)


def _report_files(folder: Path, output: Path, result: dict[str, Any]) -> None:
    """Print where the scores are; where the model is an exported folder, its card has them too."""
    typer.echo(f"written to {output}")
    if (folder / "parity.json").is_file():
        from lbr_ds.export.card import add_scores

        add_scores(folder, result)


def _default_output(model: str) -> Path:
    from lbr_ds import runs

    found = runs.resolve_model(model)
    run = runs.run_of(Path(model)) if found.ours else None
    if run is None or found.folder is None:
        return Path(Path(model).name + ".json")
    stage = next((p.name for p in found.folder.parents if p.name[:5] == "stage"), "")
    return run / "eval" / f"{stage or 'base'}.json"


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder; default: the first run.")
    ] = None,
) -> None:
    """Curves, scores and held-out examples of runs: report.html, report.md, report.json.

    Example: `lbr-ds report runs/demo`
    """
    from lbr_ds.report import write_report

    output = out or run[0]
    with writing(output):
        write_report(run, output)
    typer.echo(f"{output / 'report.html'}")


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6, figure3, or bottleneck.")],
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of training: 0,1,2; default: the recipe's.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the result here.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks of each training.")] = None,
    max_queries: Annotated[
        int | None, typer.Option(min=1, help="A seeded sample of the held-out queries.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs; do nothing.")] = False,
    only: Annotated[int | None, typer.Option(help="Do this job of the list alone.")] = None,
) -> None:
    """A table of the paper with a recipe: train what is missing, score it, print both side by side.

    Example: `lbr-ds reproduce table3 medical-demo --seeds 0,1 --json table3.json`
    """
    from lbr_ds.reproduce import command

    if out is not None:
        check_writable(out)
    with writing(out or "the run folders"):
        told = command(
            table,
            recipe,
            overrides or [],
            seeds=seeds,
            nproc=nproc,
            max_queries=max_queries,
            dry_run=dry_run,
            only=only,
            out=out,
        )
    typer.echo(told)
