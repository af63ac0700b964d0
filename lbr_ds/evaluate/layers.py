"""Which state is the embedding: retrieval by layer and by what is read of it.

A stage's loss reaches some states and not others (stage 1: mostly keys and values of B), so the
best state need not be the one that `model/embedder.py` reads. Layer 0 is the embedding itself, the
last one comes after the final norm. Of each layer:

| read         |                                                              |
|--------------|--------------------------------------------------------------|
| `last`       | the last token: the last B, without a bottleneck the end     |
| `bottleneck` | the mean over the K bottleneck tokens, where there are some  |
| `mean`       | the mean over all tokens                                     |
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import normalize

from lbr_ds.batching import pack, split_by_tokens
from lbr_ds.evaluate import geometry
from lbr_ds.evaluate.judgements import Judgements
from lbr_ds.evaluate.retrieval_metrics import rank_scores

if TYPE_CHECKING:
    from lbr_ds.model.encoder import PackedEncoder

_BATCH_TOKENS = 2048


def score_layers(folder: Path, judged: Judgements) -> list[dict[str, Any]]:
    """A row for each layer and reading; folder: one with `lbr.json`.

    Returns [{"layer", "read", "recall_at_10", "ndcg_at_10", "separation_ratio"}]. All states of all
    texts are held in half precision: layers x readings x texts x hidden size x 2 bytes.
    """
    from lbr_ds.model.encoder import PackedEncoder

    model = PackedEncoder(folder)
    queries = states(model, list(judged.queries.values()))
    documents = states(model, list(judged.documents.values()))
    places = judged.places()
    rows = []
    for read, layers in queries.items():
        for layer, vectors in enumerate(zip(layers, documents[read], strict=True)):
            asking, found = map(geometry.normalised, vectors)
            ratio = geometry.separation_ratio(asking, found, *places)
            scores = {**rank_scores(*vectors, judged), "separation_ratio": ratio}
            figures = {k: round(v, 5) if math.isfinite(v) else None for k, v in scores.items()}
            rows.append({"layer": layer, "read": read, **figures})
    return rows


@torch.inference_mode()
def states(model: PackedEncoder, texts: list[str]) -> dict[str, np.ndarray]:
    """Reading: (layers + 1, N, D) float16, of unit length, in the order of `texts`."""
    sequences = model.texts.embed(texts)
    own = model.card.num_bottleneck
    config = model.model.backbone.config
    shape = (config.num_hidden_layers + 1, len(texts), config.hidden_size)
    reads = ("last", "bottleneck", "mean") if own > 1 else ("last", "mean")
    found = {read: np.empty(shape, np.float16) for read in reads}
    for chosen in split_by_tokens(sequences, _BATCH_TOKENS):
        batch = pack([sequences[i] for i in chosen]).to(model.device)
        layers = model.model.states(batch)
        begins, ends = batch.starts[:-1].tolist(), batch.starts[1:].tolist()
        starts = {"last": [e - 1 for e in ends], "bottleneck": [e - own for e in ends]}
        for read in reads:
            rows = zip(starts.get(read, begins), ends, strict=True)
            pooled = torch.stack([layers[:, a:b].mean(1) for a, b in rows], dim=1)
            found[read][:, chosen] = normalize(pooled, dim=-1).cpu().numpy()
    return found
