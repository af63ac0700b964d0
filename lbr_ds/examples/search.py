"""Encode documents and queries with a trained model, and search with numpy or faiss.

    python search.py MODEL "first query" "second query" < documents.txt

MODEL is a run folder, a checkpoint, an exported folder, or a name of the Hugging Face hub.
One document a line is read from standard input.
"""

from __future__ import annotations

import sys

import numpy as np

import lbr_ds


def nearest(
    queries: np.ndarray, documents: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine similarities and row numbers of the `count` nearest documents.

    Args:
        queries: (Q, d) float32, L2-normalised.
        documents: (D, d) float32, L2-normalised.
        count: The number of documents for each query.
    """
    try:
        import faiss  # exact inner product; choose IndexHNSWFlat or IndexIVFPQ for large corpora
    except ImportError:
        scores = queries @ documents.T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(scores, rows, axis=1), rows
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    return index.search(queries, count)


def main(model: str, *queries: str) -> None:
    """Print the three nearest documents of each query."""
    documents = [line.strip() for line in sys.stdin if line.strip()]
    encoder = lbr_ds.Encoder(model)
    # The instructions that the model was trained with are added by the encoder.
    vectors = encoder.encode_documents(documents)
    scores, rows = nearest(encoder.encode_queries(list(queries)), vectors, min(3, len(documents)))
    for query, row_scores, row_numbers in zip(queries, scores, rows, strict=True):
        print(query)
        for score, row in zip(row_scores, row_numbers, strict=True):
            print(f"  {score:.3f}  {documents[row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
