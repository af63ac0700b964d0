"""Predict what it takes to encode a corpus and to mine in it: time, disk, memory of the first rank.

Encoding is a forward without a head (`pace.encoding_seconds`). The search is counted: every query
meets every passage in fp32, and the vectors are read from disk once for each part of the queries.
What a processor does for each text was measured (ASSUMED). Encoding and search have
not been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lbr_ds.config import RunConfig
from lbr_ds.config.mining import searched_together
from lbr_ds.plan import pace
from lbr_ds.plan.gpus import Cluster
from lbr_ds.plan.shape import Shape

ASSUMED = {
    # Share of the peak in bf16 that products in fp32 reach at most, without tensor cores: data
    # sheets of A100 (1/16), H100 and H200 (1/15).
    "fp32": 1 / 16,
    "disk": 2e9,  # bytes/s of vectors that a rank reads
    "score": 12,  # bytes of memory traffic per score: written, read twice; counted
    # Measured on one busy core of an AMD EPYC with 1,000,000 passages and 100,000 queries
    # (mining/README.md): the first rank reads the passages, chooses negatives, writes and checks
    # the data.
    "read": 25e-6,  # seconds per passage
    "write": 55e-6,  # per passage
    "choose": 0.39e-3,  # per query
    # All sort rankings. The whole search, products included, took 1.5 ms with 100,000 passages.
    "sort": 1.5e-3,  # per query
    # Bytes of the first rank per passage and query: counted. Measured were 394 per passage, with
    # the buffers of the search, which do not grow.
    "memory": 100,
}


@dataclass(frozen=True)
class Corpus:
    """Texts to encode.

    Attributes:
        passages: number of passages, which are searched.
        queries: number of queries.
        tokens: length of a text, with its bottleneck.
    """

    passages: int
    queries: int
    tokens: int


def plan_encoding(run: RunConfig, shape: Shape, cluster: Cluster, corpus: Corpus) -> dict[str, Any]:
    """Predict `lbr-ds mine` with the vectors of a model of this shape, ready for JSON.

    Returns:
        Seconds of `encode`, `search` and `alone` (the first rank, while the others wait), their sum
        in hours, tokens per second and GPU, and GiB of disk and of memory on the first rank.
    """
    gpu, world = cluster.gpu, cluster.world
    texts = corpus.passages + corpus.queries
    width = 4 if gpu.cpu else 2
    encode = pace.encoding_seconds(shape, -(-texts // world), corpus.tokens, gpu, width=width)
    kept = run.mining.ranks[1]
    part = searched_together(corpus.queries, kept)
    passes = -(-corpus.queries // (part * world))
    own = min(corpus.queries, passes * part)
    size = corpus.passages * shape.hidden
    rate = gpu.tflops * 1e12 * gpu.matmul * (1 if gpu.cpu else ASSUMED["fp32"])
    scan = own * corpus.passages * ASSUMED["score"] / (gpu.hbm * 1e9 * pace.ASSUMED["hbm"])
    search = max(2 * own * size / rate + scan, passes * 4 * size / ASSUMED["disk"])
    search += own * ASSUMED["sort"]
    alone = corpus.passages * (ASSUMED["read"] + ASSUMED["write"])
    alone += corpus.queries * ASSUMED["choose"]
    return {
        "passages": corpus.passages,
        "queries": corpus.queries,
        "tokens": corpus.tokens,
        "dimension": shape.hidden,
        "seconds": {"encode": encode, "search": search, "alone": alone},
        "hours": (encode + search + alone) / 3600,
        "tokens_per_second_per_gpu": texts / world * corpus.tokens / encode,
        "vectors_gib": texts * shape.hidden * 4 / 2**30,
        "rankings_gib": corpus.queries * kept * 12 / 2**30,
        "first_rank_gib": texts * ASSUMED["memory"] / 2**30,
    }
