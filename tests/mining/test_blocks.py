"""Search by blocks from files against all in memory, bit for bit; shared by ranks; killed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.errors import DataError
from lbr_ds.mining import dense, vectors
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking, best
from lbr_ds.records import Record
from tests.mining.toy import file_bytes
from tests.tiny import records

COUNT = 7


class Integers:
    """Vectors of small integers: their products are exact in any order, and many are equal."""

    name = fingerprint = "integers"

    def encode(self, texts: list[str], side: str) -> NDArray[np.float32]:
        seeds = [
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts
        ]
        draws = [np.random.default_rng(seed).integers(-2, 3, 6) for seed in seeds]
        return np.array(draws, np.float32)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """70 queries and their passages, in blocks of 16 queries and 2 x 10 passages."""
    monkeypatch.setattr(vectors, "ROWS", 10)
    monkeypatch.setattr(dense, "BLOCKS", 2)
    monkeypatch.setattr(dense, "QUERIES", 16)
    return Pool.of([Record(**raw) for raw in records(70, group_every=3)], [], [])


def on_disk(pool: Pool, work: Path) -> tuple[vectors.Vectors, vectors.Vectors]:
    encoder: Any = Integers()
    asked = [record.query for record in pool.queries]
    return (
        vectors.embed(asked, encoder, "query", work),
        vectors.embed(pool.passages, encoder, "document", work),
    )


def in_memory(pool: Pool) -> list[Ranking]:
    """One matrix of all scores."""
    encoder, found = Integers(), []
    asked = encoder.encode([record.query for record in pool.queries], "query")
    full = asked @ encoder.encode(pool.passages, "document").T
    for number, scores in enumerate(full):
        positive = float(scores[pool.positives[number]].min())
        scores[pool.banned(number)] = -np.inf
        found.append(Ranking(*best(scores, np.arange(len(scores)), COUNT), positive))
    return found


def same(found: list[Ranking], expected: list[Ranking]) -> bool:
    return len(found) == len(expected) and all(
        a.passages.tolist() == b.passages.tolist()
        and a.scores.tobytes() == b.scores.tobytes()
        and a.positive == b.positive
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_blocks_from_files_equal_all_in_memory(pool: Pool, tmp_path: Path, ranks: int) -> None:
    asked, passages = on_disk(pool, tmp_path)
    scores = [ranking.scores for ranking in in_memory(pool)]
    assert any(len(np.unique(row)) < COUNT for row in scores)  # equal ones, settled by number
    for rank in range(ranks):
        dense.rank_share(pool, asked, passages, COUNT, tmp_path, World(rank, ranks))
    stored = file_bytes(tmp_path)
    found = list(dense.rank(pool, asked, passages, COUNT, tmp_path))
    assert same(found, in_memory(pool))
    assert file_bytes(tmp_path) == stored  # nothing was left to do


def test_a_killed_search_goes_on(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its last whole block of queries; one that is damaged is made again."""
    asked, passages = on_disk(pool, tmp_path)
    made: list[int] = []
    search = dense._rank

    def counted(*args: Any) -> list[Ranking]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(int(args[-1][0]))
        return search(*args)

    monkeypatch.setattr(dense, "_rank", counted)
    with pytest.raises(KeyboardInterrupt):
        list(dense.rank(pool, asked, passages, COUNT, tmp_path))
    first, *_ = sorted(tmp_path.rglob("*.npz"))
    first.write_bytes(first.read_bytes()[:-30])
    done = made.copy()
    made.clear()
    made.append(-1)  # room for two more
    with pytest.raises(KeyboardInterrupt):
        list(dense.rank(pool, asked, passages, COUNT, tmp_path))
    assert (done, made[1:]) == ([0, 16, 32], [0, 48])
    monkeypatch.setattr(dense, "_rank", search)
    assert same(list(dense.rank(pool, asked, passages, COUNT, tmp_path)), in_memory(pool))


def test_other_bans_are_another_search(pool: Pool, tmp_path: Path) -> None:
    asked, passages = on_disk(pool, tmp_path)
    alone = Pool.of([Record(**raw) for raw in records(70)], [], [])
    assert alone.passages == pool.passages
    keys = {dense.rank_key(p, asked, passages, n) for p in (pool, alone) for n in (7, 8)}
    assert len(keys) == 4


def test_few_blocks_are_mapped(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 65,530 mappings, and 100 million vectors are more blocks."""
    monkeypatch.setattr(vectors, "_MAPPED", 2)
    _, passages = on_disk(pool, tmp_path)
    expected = Integers().encode(pool.passages, "document")
    assert np.array_equal(passages.rows(np.arange(passages.count)), expected)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").count(str(tmp_path))
    assert maps == 2 < passages.count // 10
    (passages.folder / "00003.npy").unlink()
    with pytest.raises(DataError, match=r"00003\.npy: missing or damaged since it was written"):
        passages.rows(np.array([35]))
