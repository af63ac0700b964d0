"""`lbr-ds push`: upload an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="A folder made by `lbr-ds export`.")],
    name: Annotated[str, typer.Argument(help="The repository: OWNER/NAME.")],
    public: Annotated[
        bool,
        typer.Option(
            "--public", help="If the repository is new, make it public. Default: private."
        ),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to. Default: main.")
    ] = None,
) -> None:
    """Upload an exported model to the Hugging Face hub, in one commit.

    The access token is the one that `hf auth login` stored, or HF_TOKEN. Besides the weights, the
    upload contains the model card, the record of the verified vectors (parity.json) and 64-bit
    hashes of the training texts.

    Example: `lbr-ds push models/demo my-name/demo`
    """
    from lbr_ds.exporting.push import push as push_model

    typer.echo(push_model(folder, name, private=not public, revision=revision))
