"""Score retrieval with the hidden states of every layer, pooled in several ways.

A stage's loss trains some states and not others (stage 1: mostly keys and values of B), so the
best state need not be the one that `model/embedder.py` uses. Layer 0 is the embedding table's
output, the last layer comes after the final norm. Of each layer:

| pooling      |                                                              |
|--------------|--------------------------------------------------------------|
| `last`       | the last token: the last of B, or the end token without B    |
| `bottleneck` | the mean over the K bottleneck tokens, if there are several  |
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
from lbr_ds.evaluation import geometry
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.retrieval_metrics import rank_scores

if TYPE_CHECKING:
    from lbr_ds.model.packed_encoder import PackedEncoder

_BATCH_TOKENS = 2048


def score_layers(folder: Path, judged: Judgements) -> list[dict[str, Any]]:
    """Score each layer and pooling of a model folder.

    All states of all texts are held in half precision: layers x poolings x texts x hidden size x 2
    bytes.

    Returns:
        [{"layer", "read": pooling, "recall_at_10", "ndcg_at_10", "separation_ratio"}].
    """
    from lbr_ds.model.packed_encoder import PackedEncoder

    model = PackedEncoder(folder)
    queries = states(model, list(judged.queries.values()))
    documents = states(model, list(judged.documents.values()))
    own, mates = judged.document_indices()
    rows = []
    for read, layers in queries.items():
        for layer, vectors in enumerate(zip(layers, documents[read], strict=True)):
            x, y = map(geometry.normalised, vectors)
            ratio = geometry.separation_ratio(x, y, own, mates)
            scores = {**rank_scores(*vectors, judged), "separation_ratio": ratio}
            figures = {k: round(v, 5) if math.isfinite(v) else None for k, v in scores.items()}
            rows.append({"layer": layer, "read": read, **figures})
    return rows


@torch.inference_mode()
def states(model: PackedEncoder, texts: list[str]) -> dict[str, np.ndarray]:
    """Return {pooling: (layers + 1, N, D) float16, normalised}, in the order of `texts`."""
    sequences = model.tokenizer.embed(texts)
    own = model.card.num_bottleneck
    config = model.model.backbone.config
    shape = (config.num_hidden_layers + 1, len(texts), config.hidden_size)
    reads = ("last", "bottleneck", "mean") if own > 1 else ("last", "mean")
    found = {read: np.empty(shape, np.float16) for read in reads}
    for chosen in split_by_tokens(sequences, _BATCH_TOKENS):
        batch = pack([sequences[i] for i in chosen]).to(model.device)
        layers = model.model.states(batch)
        begins, ends = batch.starts[:-1].tolist(), batch.starts[1:].tolist()
        counts = [sequences[i].num_bottleneck for i in chosen]
        starts = {
            "last": [e - 1 for e in ends],
            "bottleneck": [e - k for e, k in zip(ends, counts, strict=True)],
        }
        for read in reads:
            rows = zip(starts.get(read, begins), ends, strict=True)
            pooled = torch.stack([layers[:, a:b].mean(1) for a, b in rows], dim=1)
            found[read][:, chosen] = normalize(pooled, dim=-1).cpu().numpy()
    return found
