"""Suite `encode`: our encoder against `SentenceTransformer.encode` on the same exported folder.

encode_over_st: texts/s on queries and passages together, both sides with their own defaults
(sentence-transformers sorts by length and pads batches of 32), same weights, fp32 on a CPU.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from lbr_ds.bench.measure import ROUNDS, Row, interleaved, ratio
from lbr_ds.errors import LbrError
from tests.benchmarks.texts import backbone, pairs

PAIRS = 96  # a query and a passage each
QUICK = {"rounds": 2, "count": 4, "num_layers": 2}
BATCH = 32  # sentence-transformers' own default
CLOSE = 1e-4  # largest difference of a component of the two sides' vectors


def suite(
    data: Path | None = None, rounds: int = ROUNDS, count: int = PAIRS, num_layers: int = 6
) -> list[Row]:
    """One row. data: see `material.pairs`. Raises LbrError when the two sides' vectors differ."""
    from sentence_transformers import SentenceTransformer

    from lbr_ds.exporting import export
    from lbr_ds.model.packed_encoder import PackedEncoder

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    records = pairs(data, count)
    texts = [text for record in records for text in (record.query, record.positives[0])]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        export(backbone(num_layers).run / "backbone", model)
        ours = PackedEncoder(model)
        theirs = SentenceTransformer(str(model), trust_remote_code=False)
    largest = np.abs(ours.encode(texts) - theirs.encode(texts)).max()
    if not largest <= CLOSE:
        raise LbrError(f"encode_over_st: the two sides' vectors differ by {largest:.1e}")

    def rate(encode: Callable[[list[str]], object]) -> Callable[[], float]:
        def run() -> float:
            begin = perf_counter()
            encode(texts)
            return len(texts) / (perf_counter() - begin)

        return run

    lengths = [len(ids) for ids in ours.tokenizer.contexts(texts)]
    layers = ours.model.backbone.config.num_hidden_layers
    measured = interleaved(rate(ours.encode), rate(lambda t: theirs.encode(t)), rounds)
    return [
        ratio(
            "encode_over_st",
            measured,
            goal=1.15,
            better="higher",
            floor=1.0,
            about=f"texts/s on {len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, mean "
            f"{np.mean(lengths):.0f}, {layers} layers; sentence-transformers in batches of {BATCH}",
            theory=_theory(ours.model.backbone, lengths, [len(text) for text in texts]),
        )
    ]


def _theory(model: Any, lengths: list[int], characters: list[int]) -> float:
    """Multiplications of theirs over ours: padding, and the last layer's rows that nobody reads.

    Their batches: sorted by characters, each padded to its longest; attention over the whole
    rectangle. Ours: no padding, causal attention over half of each square.
    """
    layer, config = model.base_model.layers[-1], model.config
    weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    attention = layer.self_attn
    spared = sum(
        p.numel()
        for p in (*layer.mlp.parameters(), attention.q_proj.weight, attention.o_proj.weight)
        if p.ndim == 2
    )
    width = 2 * attention.q_proj.weight.shape[0]  # scores and values, a pair
    depth = config.num_hidden_layers
    order = sorted(range(len(lengths)), key=lambda i: -characters[i])
    theirs = 0.0
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        longest = max(lengths[i] for i in batch)
        theirs += len(batch) * depth * (longest * weights + longest**2 * width)
    ours = sum(depth * (n * weights + n * (n + 1) / 2 * width) - (n - 1) * spared for n in lengths)
    return theirs / ours
