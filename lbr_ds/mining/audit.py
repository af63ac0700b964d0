"""The result of `mine`: negatives of each query, in little memory, and the audit mining.json."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

import lbr_ds
from lbr_ds.config import RunConfig
from lbr_ds.encoder import Encoder
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.rules import Chooser, Negative
from lbr_ds.mining.stored import Lists

EXAMPLES = 10
TEACHERS = {"score_with", "teacher_vectors"}  # keys of `teach.py`
_CHARS = 600  # of a text shown in the audit


@dataclass
class Chosen:
    """The negatives of each query, 8 bytes each, and some of them for the audit, drawn by seed."""

    passages: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    drawn: list[tuple[int, Negative]] = field(default_factory=list)
    mined: int = 0  # queries with negatives

    def add(self, found: list[Negative], draw: Random) -> None:
        """Add the negatives of the next query; each query with some is drawn equally likely."""
        query = len(self.ends)
        self.passages.extend(negative.passage for negative in found)
        self.ends.append(len(self.passages))
        if not found:
            return
        place = self.mined if self.mined < EXAMPLES else draw.randrange(self.mined + 1)
        self.mined += 1
        if place < EXAMPLES:
            self.drawn[place : place + 1] = [(query, found[0])]

    @property
    def negatives(self) -> Lists:
        """The passages of each query."""
        return Lists(np.array(self.passages, np.int64), np.array(self.ends, np.int64))


def audit_of(
    run: RunConfig,
    pool: Pool,
    chooser: Chooser,
    chosen: Chosen,
    encoders: dict[str, Encoder],
    fingerprint: str,
) -> dict[str, Any]:
    """Return the content of mining.json, without times and paths, so that it is reproducible."""
    tally = chooser.tally
    return {
        "fingerprint": fingerprint,
        "program": lbr_ds.__version__,
        "seed": run.seed,
        "settings": json.loads(run.mining.model_dump_json(exclude=TEACHERS)),
        "models": {
            part: {"name": e.name, "fingerprint": e.fingerprint} for part, e in encoders.items()
        },
        "passages": len(pool.passages),
        "passages_left_out_as_held_out": pool.held_out,
        "queries": len(pool.queries),
        "candidates_seen": tally.seen,
        "kept": tally.kept,
        "dropped": dict(tally.dropped),
        "queries_left_short": tally.short,
        "queries_with_none": tally.none,
        "examples": [_example(pool, *each) for each in sorted(chosen.drawn)],
    }


def _example(pool: Pool, query: int, negative: Negative) -> dict[str, Any]:
    """Return a query with its first positive and its first negative, truncated."""
    own = pool.positives[query].tolist()
    ratio = negative.score / negative.positive if negative.positive > 0 else None
    return {
        "id": pool.ids[query],
        "query": pool.queries[query][:_CHARS],
        "positive": pool.passages[own[0]][:_CHARS] if own else "",
        "negative": pool.passages[negative.passage][:_CHARS],
        "method": negative.method,
        "rank": negative.rank,
        "score": round(negative.score, 4),
        "score_of_positive": round(negative.positive, 4),
        "ratio": None if ratio is None else round(ratio, 3),
    }
