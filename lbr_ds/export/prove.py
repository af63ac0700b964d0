"""The proof that an exported folder gives the trainer's own vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lbr_ds.model.bottleneck import Card
from lbr_ds.model.encoder import PackedEncoder
from lbr_ds.model.trust import SAFE
from lbr_ds.model.widen import widen

TOLERANCE = 1e-5  # largest difference of a component, in fp32


def proof_texts(max_length: int) -> list[str]:
    """Short, empty, odd and overlong texts, around the maximum length in tokens."""
    lengths = (1, 2, max_length // 2, max_length - 6, max_length - 2, max_length, 3 * max_length)
    texts = [" ".join(["word"] * max(1, n)) for n in lengths]
    return [
        *texts,
        "",
        "A",
        "naive cafe\nwith a line break",
        "x" * (4 * max_length),
        "\u00e9\u03b2",
    ]


def prove(folder: Path) -> dict[str, Any]:
    """Encode the same texts by our encoder and by sentence-transformers, both in fp32.

    One after the other, on weights as they are stored: the host holds them once.
    """
    from sentence_transformers import SentenceTransformer

    card = Card.load(folder)
    texts = proof_texts(card.max_length)
    encoder = PackedEncoder(folder, device="cpu", dtype="auto")
    widen(encoder.model)
    ours = encoder.encode(texts)
    del encoder
    stock = SentenceTransformer(
        str(folder),
        device="cpu",
        trust_remote_code=False,
        model_kwargs={"dtype": "auto", **SAFE},
        local_files_only=True,
    )
    widen(stock)
    largest = {}
    for batch_size in (1, 3, len(texts)):  # alone, in mixed batches, all together
        theirs = stock.encode(texts, batch_size=batch_size, show_progress_bar=False)
        largest[str(batch_size)] = float(np.abs(theirs - ours).max())
    return {
        "texts": len(texts),
        "largest_difference": max(largest.values()),
        "by_batch_size": largest,
        "limit": TOLERANCE,
    }
