"""The command line: one verb, one function. Heavy imports happen inside the verbs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from lbr_ds import __version__
from lbr_ds.address import mask_record, masked
from lbr_ds.errors import ConfigError, LbrError

app = typer.Typer(
    help="Learn Before Represent: a causal LLM becomes the embedding model of one domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[str, typer.Argument(help="A recipe: a YAML file, or a shipped name (demo).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Override recipe keys.")
]


def main() -> None:
    """Run a verb; a user's error is one line on stderr and its class's exit code."""
    _open_console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost peer gets one line, of ours
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars are noise in a log file
    code = _run()
    if "lbr_ds.distributed" in sys.modules:
        from lbr_ds.distributed import end

        end(code)
    sys.exit(code)


def _run() -> int:
    """The verb's exit code."""
    try:
        return int(app(prog_name="lbr-ds", standalone_mode=False) or 0)
    except TyperException as error:
        # Typer's own faults have a form of their own (format_message).
        _complain(f"{getattr(error, 'format_message', error.__str__)()} (see lbr-ds --help)")
        return ConfigError.exit_code
    except LbrError as error:
        if not error.told:
            _complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _complain(message: str) -> None:
    """One line, whatever the message was made of."""
    print("lbr-ds: error:", masked(" ".join(message.split())), file=sys.stderr, flush=True)


def _open_console() -> None:
    """Our own log speaks on stderr (each rank also writes a file); libraries only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    own = logging.getLogger("lbr_ds")
    own.setLevel(logging.INFO)
    own.propagate = False
    speaker = logging.StreamHandler(sys.stderr)
    speaker.addFilter(mask_record)
    own.addHandler(speaker)
    # torch 2.13 deprecates collectives that DeepSpeed 0.19 calls at every step.
    warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lbr-ds {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Only options of the program itself."""


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Copy recipes, ds_configs and SLURM templates into a new folder, to edit.

    Example: `lbr-ds init my-project`
    """
    from lbr_ds import resources

    folder.mkdir(parents=True, exist_ok=True)
    files = resources.copy_all(folder)
    typer.echo(
        f"{len(files)} files in {folder}: recipes/, ds_configs/, slurm/ (see slurm/README.md)"
    )


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Raw corpora -> records -> leak-checked splits -> tar shards.

    Example: `lbr-ds prepare demo`
    """
    from lbr_ds.config import load
    from lbr_ds.console import Bars, show_curation
    from lbr_ds.corpora.prepare import prepare as prepare_data

    run = load(recipe, overrides or [])
    with Bars() as bars:
        curation = prepare_data(run.data, run.seed, bars, run.model)
    show_curation(curation, run.data.local_folder)


@app.command()
def mine(recipe: Recipe, overrides: Overrides = None) -> None:
    """Hard negatives for stage 2: found by BM25 or a model, checked, written into the data's cl.

    Example: `lbr-ds mine demo mining.keep=2`
    """
    from lbr_ds.config import load
    from lbr_ds.console import Bars, show_mining
    from lbr_ds.mining.mine import mine as mine_negatives

    run = load(recipe, overrides or [])
    with Bars() as bars:
        audit = mine_negatives(run, bars)
    show_mining(audit, run.data.local_folder, run.stage2.num_negatives)


@app.command()
def train(
    recipe: Recipe,
    stage: Annotated[
        int, typer.Option(min=1, max=2, help="1: learn (IB-GL). 2: represent (GR-CL).")
    ],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; default: one per GPU.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although recipe or data have changed since.")
    ] = False,
) -> None:
    """Train one stage; goes on from the newest checkpoint of the run folder by itself.

    Example: `lbr-ds train demo --stage 1 --nproc 2 stage1.num_steps=50`
    """
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    from lbr_ds.distributed import launched_as_rank

    if not launched_as_rank():
        import torch

        count = nproc or max(1, torch.cuda.device_count())
        if count > 1:
            from lbr_ds.train.launch import launch

            arguments = ["train", recipe, *(overrides or []), "--stage", str(stage)]
            raise typer.Exit(launch([*arguments, *(["--force"] if force else [])], count))
    elif nproc is not None:
        raise ConfigError(
            f"--nproc {nproc}: a launcher has started the ranks already; leave it out"
        )
    from lbr_ds.train.loop import train as train_stage
    from lbr_ds.train.preempt import EXIT_CODE

    if not train_stage(run, stage, force=force):
        raise typer.Exit(EXIT_CODE)


@app.command()
def plan(
    recipe: Recipe,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each node.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200, mi300x, or a YAML file as plan/gpus.yaml.")
    ] = "h100",
    network: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s to other nodes, per GPU and direction.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The backbone's config.json, where it is not found.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the plan here.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Measure the memory with GPUS real ranks here instead.")
    ] = False,
) -> None:
    """Memory, traffic and time of both stages on a cluster, before any GPU is asked for.

    Example: `lbr-ds plan huatuo-7b --nodes 4 --gpus 8 --gpu h100`
    """
    from lbr_ds.config import load
    from lbr_ds.plan import Cluster, find_gpu
    from lbr_ds.plan import plan as make_plan
    from lbr_ds.plan.table import show_plan, write

    run = load(recipe, overrides or [])
    if check:
        from lbr_ds.plan.check import check_here

        raise typer.Exit(check_here(run, sys.argv[1:], gpus, config, out))
    result = make_plan(run, Cluster(nodes, gpus, find_gpu(gpu, network)), config)
    show_plan(result, recipe)
    write(result, out)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint of it.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Checkpoint -> a folder for sentence-transformers, MTEB and servers, with a parity proof.

    Example: `lbr-ds export runs/demo models/demo`
    """
    from lbr_ds.export import export as export_model

    parity = export_model(run, out)
    typer.echo(
        f"{out}: {parity['texts']} texts agree with the trainer's own vectors, "
        f"largest difference {parity['largest_difference']:.1e}"
    )


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
        Path | None, typer.Option(help="JSON; default: RUN/eval/STAGE.json, or MODEL.json here.")
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
) -> None:
    """Retrieval scores by MTEB on the held-out split, on official tasks, or both.

    Example: `lbr-ds eval runs/demo --data data/icd10cm`
    """
    from lbr_ds.console import show_scores
    from lbr_ds.evaluate import evaluate as score
    from lbr_ds.evaluate import split_names

    output = out or _default_output(model)
    result = score(
        model, data=data, tasks=split_names(tasks), output=output,
        max_queries=max_queries, examples=examples, trust_remote_code=trust_remote_code,
        allow_overlap=allow_overlap, generation=generation,
    )  # fmt: skip
    show_scores(result)
    typer.echo(f"written to {output}")


def _default_output(model: str) -> Path:
    from lbr_ds import runs

    run = runs.run_of(Path(model)) if Path(model).is_dir() else None
    if run is None:
        return Path(Path(model).name + ".json")
    stage = next(
        (p.name for p in runs.model_folder(Path(model)).parents if p.name[:5] == "stage"), ""
    )
    return run / "eval" / f"{stage or 'base'}.json"


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="A folder; default: the first run.")] = None,
) -> None:
    """Curves, scores and held-out examples of runs: report.html, report.md, report.json.

    Example: `lbr-ds report runs/demo`
    """
    from lbr_ds.report import write_report

    output = out or run[0]
    write_report(run, output)
    typer.echo(f"{output / 'report.html'}")


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="table1 to table6, or figure3.")],
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of training: 0,1,2; default: the recipe's.")
    ] = "",
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
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

    typer.echo(
        command(
            table, recipe, overrides or [], seeds=seeds, nproc=nproc, max_queries=max_queries,
            dry_run=dry_run, only=only, out=out,
        )
    )  # fmt: skip


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Argument(help="attention, stage1, stage2, encode, peers, all, gpu, loader, faults."),
    ],
    out: Annotated[Path | None, typer.Option("--json", help="Also write the rows here.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also measure a step's time and memory by length; a .png or .html."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Records (.jsonl, .jsonl.gz) or a prepared folder; default: the demo's."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short version, to see it run.")] = False,
) -> None:
    """Measured ratios, both sides in turn in one run, beside what is wanted of them.

    Example: `lbr-ds bench stage1 --json stage1.json --plot stage1.png`
    """
    import json

    from lbr_ds.bench import run_suite
    from lbr_ds.console import show_bench

    if plot is not None:
        from lbr_ds.bench.plot import check, draw, sweep

        check(plot)
    result = run_suite(suite, data, quick=quick)
    show_bench(result)
    if plot is not None:
        machine = result["environment"]
        result["points"] = sweep()
        draw(result["points"], plot, machine.get("device", machine["processor"]))
        typer.echo(f"drawn to {plot}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"written to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new or unfinished demo folder.")] = Path("lbr-demo"),
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks; default: one per GPU, two on a CPU.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """The whole pipeline on a small real corpus and a small real backbone, in minutes.

    Example: `lbr-ds demo --out lbr-demo`
    """
    from lbr_ds.demo import demo as run_demo

    run_demo(out, nproc, overrides or [])
