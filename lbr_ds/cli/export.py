"""`lbr-ds export`: a checkpoint as a folder for stock tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbr_ds.cli.app import CheckpointChoice
from lbr_ds.system.failures import writing


def export(
    run: Annotated[Path, typer.Argument(help="A run, a checkpoint or a merged model.")],
    out: Annotated[Path, typer.Argument(file_okay=False, help="A new folder for the model.")],
    checkpoint: CheckpointChoice = "best",
    causal_lm: Annotated[
        bool,
        typer.Option(
            "--causal-lm",
            help="Export the causal LM with its language-model head instead of an embedding model.",
        ),
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="Also write the model as ONNX, for onnxruntime and fastembed."),
    ] = False,
    onnx_int8: Annotated[
        bool,
        typer.Option(
            "--onnx-int8",
            help="Also write ONNX with 8-bit weights, and report how close its vectors are.",
        ),
    ] = False,
    bottleneck: Annotated[
        int | None,
        typer.Option(min=1, help="Append only this many bottleneck tokens, the first ones."),
    ] = None,
) -> None:
    """Export a checkpoint for sentence-transformers, MTEB and servers, and verify its vectors.

    The exported model encodes some texts, and its vectors must agree with those of the trainer.

    Example: `lbr-ds export runs/demo models/demo --onnx`
    """
    from lbr_ds import runs

    runs.model_folder(run)  # before torch is imported, which takes seconds
    from lbr_ds.exporting import export as export_model

    with writing(out):
        parity = export_model(
            run,
            out,
            checkpoint=checkpoint,
            causal_lm=causal_lm,
            onnx=onnx,
            int8=onnx_int8,
            bottleneck=bottleneck,
        )
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
