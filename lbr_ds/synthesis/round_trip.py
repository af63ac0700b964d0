"""The rank of each query's own passage among all passages of the training splits.

A query that does not find its passage is too general for it, or is about something else. Passages
of the same group are left out: they may answer the query, too. A passage with an equal score ranks
before the query's own: a query that only has words of every passage finds none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lbr_ds.encoder import Encoder
from lbr_ds.mining.pool import Pool, make_pool
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
    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=work) as folder:
        make_pool(Path(folder), pairs, passages, held_out)
        for ranking in _rankings(Pool(Path(folder)), last, encoder, work, progress):
            # Words have no score at or below 0 unless no word is common.
            unfound = encoder is None and ranking.positive <= 0
            rank = 1 + int((ranking.scores >= ranking.positive).sum())
            yield None if unfound or rank > last else rank


def _rankings(
    pool: Pool, last: int, encoder: Encoder | None, work: Path, progress: Progress
) -> Iterator[Ranking]:
    """Return the rankings of the pool's queries by words or by vectors."""
    if encoder is None:
        from lbr_ds.mining import bm25

        return bm25.rank(pool, last, progress)
    from lbr_ds.mining import dense
    from lbr_ds.mining.vectors import embed

    vectors = (
        embed(pool.asked, encoder, "query", work, progress),
        embed(pool.instructed, encoder, "document", work, progress),
    )
    return dense.rank(pool, *vectors, last, work, progress)
