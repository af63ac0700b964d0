"""Search by blocks from files against all in memory, bit for bit; shared by ranks; killed."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lbr_ds.distributed import World
from lbr_ds.errors import DataError
from lbr_ds.mining import dense, vectors
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking, best
from lbr_ds.records import Record
from lbr_ds.system import blocks
from tests.mining.toy import file_bytes, pool_of
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
def pool(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """70 queries and their passages, in blocks of 16 queries and 2 x 10 passages."""
    monkeypatch.setattr(blocks, "ROWS", 10)
    monkeypatch.setattr(dense, "BLOCKS", 2)
    monkeypatch.setattr(dense, "searched_together", lambda *_: 16)
    place = tmp_path_factory.mktemp("pool") / "pool"
    return pool_of(place, (Record(**raw) for raw in records(70, group_every=3)))


def on_disk(pool: Pool, work: Path) -> tuple[vectors.Vectors, vectors.Vectors]:
    encoder: Any = Integers()
    return (
        vectors.embed(pool.asked, encoder, "query", work),
        vectors.embed(pool.passages, encoder, "document", work),
    )


def in_memory(pool: Pool) -> list[Ranking]:
    """One matrix of all scores."""
    encoder, found = Integers(), []
    asked = encoder.encode(list(pool.queries), "query")
    full = asked @ encoder.encode(list(pool.passages), "document").T
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


def test_a_killed_search_resumes(
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
    alone = pool_of(tmp_path / "alone", (Record(**raw) for raw in records(70)))
    assert list(alone.passages) == list(pool.passages)
    keys = {dense.rank_key(p, asked, passages, n) for p in (pool, alone) for n in (7, 8)}
    assert len(keys) == 4


def test_few_blocks_are_mapped(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have 65,530 mappings, and 100 million vectors are more blocks."""
    monkeypatch.setattr(blocks, "_MAPPED", 2)
    _, passages = on_disk(pool, tmp_path)
    expected = Integers().encode(list(pool.passages), "document")
    assert np.array_equal(passages.rows(np.arange(passages.count)), expected)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").count(str(tmp_path))
    assert maps == 2 < passages.count // 10
    (passages.folder / "00003.npy").unlink()
    with pytest.raises(DataError, match=r"00003\.npy: missing or damaged since it was written"):
        passages.rows(np.array([35]))


def integers(seed: int, count: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-9, 10, (count, 8)).astype(np.float32)


class Drawn:
    """As `Vectors`: 30 blocks of 100 passages of 8 components."""

    longest_part, dimension = 100, 8

    def parts(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first in range(0, 3000, 100):
            yield first, integers(first, 100)


def test_a_search_holds_no_more_with_every_block() -> None:
    """Nothing that is made for a block outlives it: such arrays fragment the heap into gigabytes.

    Had the numbers of passages that wait to be sorted arrays of their own, these would take up to
    8 bytes * 500 * 20.
    """
    rows, passages, count = torch.from_numpy(integers(1, 500)), cast("vectors.Vectors", Drawn()), 20
    block, found = dense._Block(rows, passages), dense._Best(len(rows), count)
    held, places = [], set()
    tracemalloc.start()
    try:
        for first, scores in block.scores():
            places.add(scores.data_ptr())
            hits = block.hits(scores, torch.from_numpy(found.floors), count)
            owners, ids = (part.numpy() for part in hits.nonzero(as_tuple=True))
            found.add(owners, first + ids, scores[hits].numpy())
            del scores, hits, owners, ids
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(held) - held[0] < 8000 == 8 * 500 * 20 // 10
    assert len(held) == 15
    assert len(places) == 1
    full = rows @ torch.from_numpy(np.concatenate([part for _, part in passages.parts()])).T
    for (ids, scores), row in zip(found.rankings(), full.numpy(), strict=True):
        expected = best(row, np.arange(len(row)), count)
        assert (ids.tolist(), scores.tolist()) == tuple(part.tolist() for part in expected)
