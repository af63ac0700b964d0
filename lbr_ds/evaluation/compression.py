"""Score vectors that are truncated or quantised: retrieval quality by bytes per vector.

Truncation keeps the first components (Matryoshka, `stage2.matryoshka`). Passages are quantised by
sentence-transformers' own functions; queries stay fp32, as there is one of them per search.

| precision          | bytes | a passage's score                                                |
|--------------------|-------|------------------------------------------------------------------|
| `float32`          | 4 d   | cosine                                                           |
| `int8`             | d     | product with the middle of each component's bucket; the ranges   |
|                    |       | of the buckets are those of the corpus                           |
| `binary`           | d / 8 | number of components whose sign the query has too                |
| `binary, rescored` | d / 8 | the 40 best by `binary`, ranked by the product of the query with |
|                    |       | the passage's signs                                              |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lbr_ds.errors import ConfigError
from lbr_ds.evaluation.geometry import normalised
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.retrieval_metrics import DEPTH, rank_by

_OVERSAMPLING = 4  # passages that are rescored for each that is wanted, as sentence-transformers
Scores = Callable[[slice], np.ndarray]


def score_compressed(
    queries: np.ndarray,
    passages: np.ndarray,
    judged: Judgements,
    dimensions: Sequence[int],
    *,
    quantized: bool,
) -> list[dict[str, Any]]:
    """Score the whole vectors and each truncation, at each precision.

    Args:
        queries: (Q, D) in the order of `judged`, any float dtype and length.
        passages: (N, D) likewise.
        judged: The relevance judgements.
        dimensions: Numbers of leading components to keep.
        quantized: Whether to score `int8` and `binary` vectors too.

    Returns:
        [{"dimensions", "precision", "bytes", "recall_at_10", "ndcg_at_10"}], the longest first.

    Raises:
        ConfigError: A truncation is not shorter than the vectors.
    """
    check_dimensions(dimensions, queries.shape[1])
    rows = []
    for size in (queries.shape[1], *sorted(dimensions, reverse=True)):
        q, p = normalised(queries[:, :size]), normalised(passages[:, :size])
        kinds: dict[str, tuple[int, Scores]] = {"float32": (4 * size, _product(q, p))}
        if quantized:
            signs = _signs(p)
            kinds["int8"] = (size, _product(q, _buckets(p)))
            kinds["binary"] = (-(-size // 8), _product(_signs(q), signs))
            kinds["binary, rescored"] = (-(-size // 8), _rescored(q, signs))
        for precision, (width, scores) in kinds.items():
            figures = {k: round(v, 5) for k, v in rank_by(scores, judged).items()}
            rows.append({"dimensions": size, "precision": precision, "bytes": width, **figures})
    return rows


def check_dimensions(dimensions: Sequence[int], whole: int) -> None:
    """Raise ConfigError if a truncation is not shorter than vectors of `whole` components."""
    if dimensions and max(dimensions) >= whole:
        raise ConfigError(
            f"dimensions: {max(dimensions)} is not shorter than the model's vectors, which have "
            f"{whole} components; give smaller ones"
        )


def _product(queries: np.ndarray, passages: np.ndarray) -> Scores:
    return lambda rows: queries[rows] @ passages.T


def _rescored(queries: np.ndarray, signs: np.ndarray) -> Scores:
    own = _signs(queries)
    kept = min(_OVERSAMPLING * DEPTH, len(signs))

    def scores(rows: slice) -> np.ndarray:
        rough = own[rows] @ signs.T
        threshold = np.partition(rough, -kept, axis=1)[:, -kept, None]
        return np.where(rough >= threshold, queries[rows] @ signs.T, -np.inf)

    return scores


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Return the components of binary vectors as 1 and -1, float32."""
    from sentence_transformers.quantization import quantize_embeddings

    packed = np.asarray(quantize_embeddings(vectors, "ubinary"))
    bits = np.unpackbits(packed, axis=1, count=vectors.shape[1])
    return bits.astype(np.float32) * 2 - 1


def _buckets(vectors: np.ndarray) -> np.ndarray:
    """Return each component as the middle of its bucket of int8."""
    from sentence_transformers.quantization import quantize_embeddings

    ranges = np.stack([vectors.min(0), vectors.max(0)])
    codes = np.asarray(quantize_embeddings(vectors, "int8", ranges=ranges)).astype(np.float32)
    return ranges[0] + (codes + 128.5) * (ranges[1] - ranges[0]) / 255
