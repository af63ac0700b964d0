"""`lbr-ds push`: upload an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    from lbr_ds.exporting.push import push as push_model

    typer.echo(push_model(folder, name, private=not public, revision=revision))
