"""Verbs that build something: a project, data, a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.cli.app import Overrides, Recipe, Sharing, app, as_ranks
from lbr_ds.errors import SAVED_AND_STOPPED, ConfigError
from lbr_ds.system.failures import writing
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import public_url


@app.command()
def init(folder: Annotated[Path, typer.Argument(file_okay=False, help="A new folder.")]) -> None:
    """Copy recipes, ds_configs and SLURM templates into a new folder, to edit.

    Example: `lbr-ds init my-project`
    """
    from lbr_ds.system import resources

    with writing(folder):
        files = resources.copy_shipped(folder)
    typer.echo(
        f"{len(files)} files in {folder}: recipes/, ds_configs/, slurm/ (see slurm/README.md)"
    )


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Raw corpora -> records -> leak-checked splits -> tar shards.

    Example: `lbr-ds prepare demo`
    """
    from lbr_ds.cli.console import show_curation
    from lbr_ds.config import load
    from lbr_ds.corpora.prepare import prepare as prepare_data

    run = load(recipe, overrides or [])
    with show_progress() as progress, writing(public_url(run.data.folder)):
        curation = prepare_data(run.data, run.seed, progress, run.model, run.bottleneck.count)
    show_curation(curation, run.data.local_folder)


@app.command()
def mine(recipe: Recipe, overrides: Overrides = None, nproc: Sharing = None) -> None:
    """Hard negatives for stage 2: found by BM25 or a model, checked, written into the data's cl.

    Example: `lbr-ds mine demo mining.keep=2`
    """
    from lbr_ds.cli.console import show_mining
    from lbr_ds.config import load
    from lbr_ds.mining.mine import mine as mine_negatives

    run = load(recipe, overrides or [])
    world = as_ranks(nproc, run.engine.timeout_minutes)
    with show_progress() as progress, writing(public_url(run.data.folder)):
        audit = mine_negatives(run, progress, world)
    if audit is not None:
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

    Stage 2 begins at the checkpoint of stage 1 that did best on held-out pairs (stage2.from).

    Example: `lbr-ds train demo --stage 1 --nproc 2 stage1.num_steps=50`
    """
    from lbr_ds.config import load

    run = load(recipe, overrides or [])
    from lbr_ds.distributed import launched_ranks

    if not launched_ranks():
        import torch

        count = nproc or max(1, torch.cuda.device_count())
        if count > 1:
            from lbr_ds.train.launch import check_nproc, launch

            check_nproc(count, [run.stage(stage).samples_per_step])
            arguments = ["train", recipe, *(overrides or []), "--stage", str(stage)]
            raise typer.Exit(launch([*arguments, *(["--force"] if force else [])], count))
    elif nproc is not None:
        raise ConfigError(
            f"--nproc {nproc}: a launcher has started the ranks already; leave it out"
        )
    from lbr_ds.train.loop import train as train_stage

    if not train_stage(run, stage, force=force):
        raise typer.Exit(SAVED_AND_STOPPED)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or one checkpoint of it.")],
    out: Annotated[Path, typer.Argument(file_okay=False, help="A new folder.")],
    causal_lm: Annotated[
        bool,
        typer.Option(
            "--causal-lm",
            help="Export the causal LM with its head, for further training or generation.",
        ),
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="ONNX files too, for onnxruntime and fastembed.")
    ] = False,
    onnx_int8: Annotated[
        bool,
        typer.Option(
            "--onnx-int8",
            help="Also write ONNX with 8-bit weights and measure the loss of accuracy.",
        ),
    ] = False,
) -> None:
    """Checkpoint -> a folder for sentence-transformers, MTEB and servers, with a parity proof.

    Example: `lbr-ds export runs/demo models/demo --onnx`
    """
    from lbr_ds.export import export as export_model

    with writing(out):
        parity = export_model(run, out, causal_lm=causal_lm, onnx=onnx, int8=onnx_int8)
    typer.echo(
        f"{out}: {len(parity['texts'])} texts agree with the trainer's own vectors, "
        f"largest difference {parity['largest_difference']:.1e}"
    )
    if (onnx_proof := parity.get("onnx")) is not None:
        int8 = ""
        if "int8_least_cosine" in onnx_proof:
            int8 = f"; 8 bits: cosine {onnx_proof['int8_least_cosine']:.4f} or more"
        typer.echo(f"{out}/onnx: largest difference {onnx_proof['largest_difference']:.1e}{int8}")
    if parity["needs"]:
        typer.echo(f"{out}: needs {parity['needs']}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder made by `lbr-ds export`.")],
    name: Annotated[str, typer.Argument(help="The repository: OWNER/NAME.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; default: private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; default: main.")] = None,
) -> None:
    """Upload an exported model to the Hugging Face hub, in one commit.

    Uses the token of `hf auth login` or HF_TOKEN. The model card, the proof of the vectors and
    64-bit hashes of the training texts are uploaded with the weights.

    Example: `lbr-ds push models/demo my-name/demo`
    """
    from lbr_ds.export.push import push as push_model

    typer.echo(push_model(folder, name, private=not public, revision=revision))


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="A new or unfinished demo folder.")
    ] = Path("lbr-demo"),
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks; default: one per GPU, two on a CPU.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """The whole pipeline on a small real corpus and a small real backbone, in minutes.

    Example: `lbr-ds demo --out lbr-demo`
    """
    from lbr_ds.demo import demo as run_demo

    with writing(out):
        run_demo(out, nproc, overrides or [])
