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
        _complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _complain(message: str) -> None:
    """One line, whatever the message was made of."""
    print("lbr-ds: error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _open_console() -> None:
    """Our own log speaks on stderr (each rank also writes a file); libraries only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    own = logging.getLogger("lbr_ds")
    own.setLevel(logging.INFO)
    own.propagate = False
    own.addHandler(logging.StreamHandler(sys.stderr))
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

            raise typer.Exit(
                launch(["train", recipe, *(overrides or []), "--stage", str(stage)], count)
            )
    elif nproc is not None:
        raise ConfigError(
            f"--nproc {nproc}: a launcher has started the ranks already; leave it out"
        )
    from lbr_ds.train.loop import train as train_stage
    from lbr_ds.train.preempt import EXIT_CODE

    if not train_stage(run, stage):
        raise typer.Exit(EXIT_CODE)


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
        str, typer.Argument(help="A folder, a run, a checkpoint, or a name that MTEB knows.")
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
        allow_overlap=allow_overlap,
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
def bench(
    suite: Annotated[str, typer.Argument(help="A suite: loader.")],
    out: Annotated[Path | None, typer.Option("--json", help="Also write the rows here.")] = None,
) -> None:
    """Measured ratios, both sides in turn in one run, beside what is wanted of them.

    Example: `lbr-ds bench loader --json loader.json`
    """
    import json

    from lbr_ds.bench import run_suite
    from lbr_ds.console import show_bench

    result = run_suite(suite)
    show_bench(result)
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
