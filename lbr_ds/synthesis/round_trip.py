"""The rank of each query's own passage among all passages of the training splits.

A query that does not find its passage is too general for it, or is about something else. Passages
of the same group are left out: they may answer the query, too. A passage with an equal score ranks
before the query's own: a query that only has words of every passage finds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lbr_ds.encoder import Encoder
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking
from lbr_ds.records import Record
from lbr_ds.system.progress import Progress, no_progress

BM25 = "bm25"


def ranks(
    pairs: Sequence[Record],
    passages: Iterable[Record],
    held_out: Iterable[Record],
    last: int,
    encoder: Encoder | None,
    work: Path,
    progress: Progress = no_progress,
) -> Iterator[int | None]:
    """Yield for each pair the rank of its passage, 1 for the best; None beyond `last`.

    Args:
        pairs: Queries with one positive each.
        passages: Records whose passages are searched, too.
        held_out: Records whose texts are not searched.
        last: The last rank of interest.
        encoder: Ranks by vectors; None: by words (BM25).
        work: Where vectors are stored.
        progress: Called with what has been done.
    """
    pool = Pool.of(list(pairs), passages, held_out)
    found: Iterator[Ranking]
    if encoder is None:
        from lbr_ds.mining import bm25

        found = bm25.rank(pool, last, progress)
    else:
        from lbr_ds.mining import dense
        from lbr_ds.mining.vectors import embed

        queries = [record.instructed_query() for record in pool.queries]
        vectors = (
            embed(queries, encoder, "query", work, progress),
            embed(pool.instructed, encoder, "document", work, progress),
        )
        found = dense.rank(pool, *vectors, last, work, progress)
    for ranking in found:
        # Words have no score at or below 0 unless no word is common.
        unfound = encoder is None and ranking.positive <= 0
        rank = 1 + int((ranking.scores >= ranking.positive).sum())
        yield None if unfound or rank > last else rank
