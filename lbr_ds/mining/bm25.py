"""BM25 over the pool, by bm25s (Lucene's variant, k1 1.5, b 0.75).

Memory: about six times the text of the pool during indexing; after that 8 bytes for each distinct
word of each passage, and 4 bytes per passage for the current query.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import bm25s
import numpy as np

from lbr_ds.corpora.curate.segmentation import words
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking, best
from lbr_ds.system.progress import Progress, no_progress

# bm25s 0.3 sets its own logger to DEBUG and tells each step.
logging.getLogger("bm25s").setLevel(logging.WARNING)


def rank(pool: Pool, count: int, progress: Progress = no_progress) -> Iterator[Ranking]:
    """Return the `count` best passages for each query of the pool, in the order of its queries.

    A passage that shares no word with the query has score 0 and is not found.
    """
    index = bm25s.BM25()
    numbers: dict[str, int] = {}  # one object a word: 8 bytes for each of its places
    places = [
        [numbers.setdefault(word, len(numbers)) for word in words(text)] for text in pool.passages
    ]
    index.index((places, numbers), show_progress=False)
    del places
    everything = np.arange(len(pool.passages))
    for number, query in enumerate(pool.queries):
        known = (index.vocab_dict.get(word) for word in words(query))
        ids = [i for i in known if i is not None]
        scores = index.get_scores_from_ids(ids) if ids else np.zeros(len(everything), np.float32)
        positive = float(scores[pool.positives[number]].min(initial=np.inf))
        scores[pool.banned(number)] = -np.inf
        scores[scores == 0] = -np.inf
        yield Ranking(*best(scores, everything, count), positive)
        progress("bm25", number + 1, len(pool.queries))
