"""BM25 against its formula, blocks against the full matrix, ties by number, the pool's bans."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lbr_ds.corpora.curate.segmentation import similarity, words
from lbr_ds.mining import bm25, dense, vectors
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import best
from lbr_ds.records import Record
from lbr_ds.system import blocks
from tests.mining.toy import Words, pool_of
from tests.tiny import records


def toy_pool(folder: Path, count: int = 90) -> Pool:
    return pool_of(folder / "pool", (Record(**raw) for raw in records(count, group_every=3)))


def bm25_by_hand(query: str, passages: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Lucene's BM25, term by term."""
    documents = [Counter(words(p)) for p in passages]
    lengths = [sum(d.values()) for d in documents]
    mean = sum(lengths) / len(lengths)
    scores = np.zeros(len(passages))
    for word in words(query):
        having = sum(word in d for d in documents)
        weight = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
        for i, document in enumerate(documents):
            often = document[word]
            scores[i] += weight * often / (often + k1 * (1 - b + b * lengths[i] / mean))
    return scores


def test_bm25_equals_the_formula(tmp_path: Path) -> None:
    pool = toy_pool(tmp_path)
    for number, ranking in enumerate(bm25.rank(pool, 12)):
        scores = bm25_by_hand(pool.queries[number], list(pool.passages))
        assert ranking.positive == pytest.approx(scores[pool.positives[number]].min(), rel=1e-5)
        scores[pool.banned(number)] = 0
        expected = np.sort(scores)[::-1][: len(ranking.passages)]
        assert ranking.scores == pytest.approx(expected, rel=1e-5)
        assert scores[ranking.passages] == pytest.approx(expected, rel=1e-5)


def test_bm25_finds_nothing_for_strange_words(tmp_path: Path) -> None:
    asked = [Record("a", "s", "zzz", ["one two"]), Record("b", "s", "one", ["three"])]
    pool = pool_of(tmp_path / "pool", asked)
    strange, known = bm25.rank(pool, 5)
    assert (len(strange.passages), strange.positive) == (0, 0.0)
    assert known.passages.tolist() == [0]


@pytest.mark.parametrize(("rows", "queries"), [(7, 5), (16, 64), (4096, 1024)])
def test_blocks_equal_the_full_matrix(
    rows: int, queries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ROWS", rows)
    monkeypatch.setattr(dense, "searched_together", lambda *_: queries)
    pool, encoder = toy_pool(tmp_path), Words()
    asked = list(pool.queries)
    of_queries = vectors.embed(asked, encoder, "query", tmp_path)
    of_passages = vectors.embed(pool.passages, encoder, "document", tmp_path)
    full = encoder.encode(asked, "query") @ encoder.encode(list(pool.passages), "document").T
    for number, ranking in enumerate(dense.rank(pool, of_queries, of_passages, 10, tmp_path)):
        assert ranking.positive == pytest.approx(
            full[number][pool.positives[number]].min(), abs=1e-6
        )
        scores = full[number].copy()
        scores[pool.banned(number)] = -np.inf
        assert ranking.scores == pytest.approx(np.sort(scores)[::-1][:10], abs=1e-6)
        assert scores[ranking.passages] == pytest.approx(ranking.scores, abs=1e-6)


def test_ties_go_to_the_lower_number() -> None:
    scores = np.array([1, 2, 2, 0, 2, -np.inf], np.float32)
    assert best(scores, np.arange(6), 2)[0].tolist() == [1, 2]
    assert best(scores, np.arange(6), 9)[0].tolist() == [1, 2, 4, 0, 3]
    assert best(scores[::-1].copy(), np.arange(6)[::-1].copy(), 2)[0].tolist() == [1, 2]


def test_the_pool_bans_group_mates_own_text_and_evals(tmp_path: Path) -> None:
    asked = [
        Record("a", "s", "what is a", ["A is one."], ["given"], group="g"),
        Record("b", "s", "what is b", ["b is two"], group="g"),
        Record("c", "s", "what is c", ["a IS one", "what is a", "c is three"], ["A text"]),
    ]
    others = [Record("t", "s", text="a text"), Record("u", "s", text="mate", group="g")]
    judged = [Record("e", "s", "what is e", ["e is five"], ["GIVEN"])]
    others.append(Record("x", "s", text="E is five!"))
    pool = pool_of(tmp_path / "pool", asked, others, judged)
    assert list(pool.passages) == [
        "A is one.",
        "b is two",
        "what is a",
        "c is three",
        "A text",
        "mate",
    ]
    assert [p.tolist() for p in pool.positives] == [[0], [1], [0, 2, 3]]
    assert [b.tolist() for b in map(pool.banned, range(3))] == [
        [0, 1, 2, 5],
        [0, 1, 5],
        [0, 2, 3, 4],
    ]
    assert pool.held_out == 2


def test_words_of_scripts_without_blanks_are_pairs() -> None:
    assert words("Na+ (in) \u9ad8\u8840\u538b x") == [
        "na+",
        "in",
        "\u9ad8\u8840",
        "\u8840\u538b",
        "x",
    ]
    assert words("\u75c5") == ["\u75c5"]


def test_the_same_text() -> None:
    assert similarity("One two, three four", "one TWO three four!") == 1
    assert similarity("one two three four", "one two three five") == pytest.approx(3 / 7)
    assert similarity("one", "two") == 0
