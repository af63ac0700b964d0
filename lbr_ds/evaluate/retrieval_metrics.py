"""Vectors and judgements -> R@10 and N@10, by trec_eval's definitions, so as mteb reports them."""

from __future__ import annotations

import numpy as np

from lbr_ds.evaluate.geometry import normalised
from lbr_ds.evaluate.judgements import Judgements

_DEPTH = 10
_TILE = 512  # queries whose scores stand in memory at a time


def rank_scores(queries: np.ndarray, passages: np.ndarray, judged: Judgements) -> dict[str, float]:
    """{"recall_at_10", "ndcg_at_10"}, means over the queries.

    queries (Q, D) and passages (N, D) in the order of `judged`, any float dtype and length; ranked
    by cosine. Of equal scores the document with the greater id (as text) comes first: trec_eval's
    rule. Each relevant document gains 1, discounted by log2(rank + 1); the ideal ranking has all
    relevant ones on top.
    """
    queries, passages = normalised(queries), normalised(passages)
    ids = list(judged.documents)
    behind = np.empty(len(ids), np.int64)
    behind[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
    depth = min(_DEPTH, len(ids))
    discounts = 1 / np.log2(np.arange(2, _DEPTH + 2))
    recalls, gains = [], []
    relevant = [judged.relevant[i] for i in judged.queries]
    for start in range(0, len(queries), _TILE):
        scores = queries[start : start + _TILE] @ passages.T
        for row, right in zip(scores, relevant[start : start + _TILE], strict=True):
            found = np.flatnonzero(row >= np.partition(row, -depth)[-depth])
            found = found[np.lexsort((behind[found], -row[found]))][:depth]
            hits = np.array([ids[i] in right for i in found])
            recalls.append(hits.sum() / len(right))
            gains.append((hits * discounts[:depth]).sum() / discounts[: len(right)].sum())
    return {"recall_at_10": float(np.mean(recalls)), "ndcg_at_10": float(np.mean(gains))}
