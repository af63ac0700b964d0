"""Recall@10 and nDCG@10 of vectors, by the definitions of trec_eval, as mteb reports them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lbr_ds.evaluation.geometry import normalised
from lbr_ds.evaluation.judgements import Judgements

DEPTH = 10
_TILE = 512  # queries whose scores are in memory at a time


def rank_scores(queries: np.ndarray, passages: np.ndarray, judged: Judgements) -> dict[str, float]:
    """Return {"recall_at_10", "ndcg_at_10"}, means over the queries.

    Documents are ranked by cosine; ties go to the greater id (as text), as in trec_eval. Each
    relevant document gains 1, discounted by log2(rank + 1).

    Args:
        queries: (Q, D) in the order of `judged`, any float dtype and length.
        passages: (N, D) likewise.
        judged: The relevance judgements.
    """
    queries, passages = normalised(queries), normalised(passages)
    return rank_by(lambda rows: queries[rows] @ passages.T, judged)


def rank_by(scores: Callable[[slice], np.ndarray], judged: Judgements) -> dict[str, float]:
    """Return {"recall_at_10", "ndcg_at_10"} of a ranking by any scores, higher ones first.

    Args:
        scores: Takes a slice of the queries and returns their scores of all documents, (n, N).
        judged: The relevance judgements.
    """
    ids = list(judged.documents)
    behind = np.empty(len(ids), np.int64)
    behind[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(ids))
    depth = min(DEPTH, len(ids))
    discounts = 1 / np.log2(np.arange(2, DEPTH + 2))
    recalls, gains = [], []
    relevant = [judged.relevant[i] for i in judged.queries]
    for start in range(0, len(relevant), _TILE):
        rows = slice(start, start + _TILE)
        for row, right in zip(scores(rows), relevant[rows], strict=True):
            top = np.flatnonzero(row >= np.partition(row, -depth)[-depth])
            top = top[np.lexsort((behind[top], -row[top]))][:depth]
            hits = np.array([ids[i] in right for i in top])
            recalls.append(hits.sum() / len(right))
            gains.append((hits * discounts[:depth]).sum() / discounts[: len(right)].sum())
    return {"recall_at_10": float(np.mean(recalls)), "ndcg_at_10": float(np.mean(gains))}
