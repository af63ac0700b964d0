"""Score retrieval with the first k bottleneck tokens alone, for several k.

Fewer tokens make a text shorter to encode. They cost little, also for a model that was trained with
all of them (recipes/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.retrieval_metrics import rank_scores


def score_counts(folder: Path, judged: Judgements, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Score a model folder with each number of bottleneck tokens, the smallest first.

    Returns:
        [{"bottleneck": k, "recall_at_10", "ndcg_at_10"}].

    Raises:
        ConfigError: The model has fewer tokens.
    """
    from lbr_ds.model.packed_encoder import PackedEncoder

    model = PackedEncoder(folder)
    whole = model.tokenizer
    chosen = {count: whole.at(count) for count in sorted(set(counts))}  # all are checked first
    rows = []
    for count, model.tokenizer in chosen.items():
        queries = model.encode(list(judged.queries.values()))
        documents = model.encode(list(judged.documents.values()))
        scores = rank_scores(queries, documents, judged)
        rows.append({"bottleneck": count, **{k: round(v, 5) for k, v in scores.items()}})
    return rows
