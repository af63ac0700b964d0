"""Every rule by itself: what it drops, what it lets pass, and how it is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lbr_ds.config import MiningConfig
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.ranking import Ranking
from lbr_ds.mining.rules import Chooser
from lbr_ds.records import Record
from tests.mining.toy import pool_of

POSITIVE = "the heart is a muscle that pumps blood"
TEXTS = [
    "the lung takes in air and gives it to the blood",
    "The heart is a muscle, that pumps blood.  Always",  # nearly the positive
    "a stone in the kidney may pass by itself in days",
    "a stone in the kidney may pass by itself in days too",  # nearly the one before
    "bones break in old age more often than in youth",
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    asked = Record("q", "s", "what is the heart", [POSITIVE])
    others = (Record(f"t{i}", "s", text=text) for i, text in enumerate(TEXTS, 1))
    return pool_of(tmp_path_factory.mktemp("rules") / "pool", [asked], others)


def ranking(scores: dict[int, float], positive: float) -> Ranking:
    return Ranking(np.array(list(scores)), np.array(list(scores.values()), np.float32), positive)


class Guide:
    def scores(self, query: int, passages: Any) -> tuple[Any, float]:
        return np.array([{1: 0.5, 5: 0.49}.get(int(p), 0.0) for p in passages]), 0.5


@pytest.mark.parametrize(
    ("settings", "scores", "positive", "reason"),
    [
        ({"max_ratio": 0.95}, 0.96, 1.0, "too_near_the_positive"),
        ({"max_ratio": 0.95}, 0.94, 1.0, ""),
        ({"max_ratio": 0.5}, 5.1, 10.0, "too_near_the_positive"),
        ({"max_ratio": None, "margin": 0.25}, 0.76, 1.0, "too_near_the_positive"),
        ({"max_ratio": None, "margin": 0.25}, 0.74, 1.0, ""),
        ({"max_ratio": 0.9, "margin": 0.25}, 0.8, 1.0, "too_near_the_positive"),
        ({"max_ratio": 0.7, "margin": 0.0}, 0.8, 1.0, "too_near_the_positive"),
        ({"max_ratio": 0.95}, 0.2, 0.0, "positive_not_found"),
        ({"max_ratio": 0.95}, -0.3, -0.2, "positive_not_found"),
        ({"max_ratio": None, "margin": 0.0}, 0.2, 0.0, "positive_not_found"),
        ({"max_ratio": None}, 9.0, 1.0, ""),
        ({"max_ratio": None}, 0.2, 0.0, ""),
    ],
)
def test_scores(
    pool: Pool, settings: dict[str, Any], scores: float, positive: float, reason: str
) -> None:
    chooser = Chooser(pool, MiningConfig(**settings), 0, near_duplicate=0.8)
    kept = chooser.choose(0, {"bm25": ranking({1: scores}, positive)})
    assert len(kept) == (not reason)
    assert +chooser.tally.dropped == ({reason: 1} if reason else {})
    assert (chooser.tally.seen, chooser.tally.short) == (1, 1)
    assert chooser.tally.none == bool(reason)


def test_texts_that_say_the_same(pool: Pool) -> None:
    found = ranking({2: 0.5, 3: 0.4, 4: 0.3, 1: 0.2}, 1.0)
    chooser = Chooser(pool, MiningConfig(), 0, near_duplicate=0.7)
    assert [n.passage for n in chooser.choose(0, {"bm25": found})] == [3, 1]
    assert +chooser.tally.dropped == {"same_as_positive": 1, "same_as_kept": 1}
    strict = Chooser(pool, MiningConfig(), 0, near_duplicate=1.0)
    assert [n.passage for n in strict.choose(0, {"bm25": found})] == [2, 3, 4, 1]


def test_the_guide_drops_what_it_takes_for_an_answer(pool: Pool) -> None:
    chooser = Chooser(pool, MiningConfig(), 0, Guide(), near_duplicate=0.8)
    kept = chooser.choose(0, {"bm25": ranking({1: 0.5, 5: 0.4}, 1.0)})
    assert [n.passage for n in kept] == [5]
    assert +chooser.tally.dropped == {"guide": 1}


def test_ranks_and_keep(pool: Pool) -> None:
    found = {"bm25": ranking({5: 0.5, 3: 0.4, 1: 0.3}, 1.0)}
    for ranks, keep, expected in (
        ((1, 9), 2, [5, 3]),
        ((2, 9), 4, [3, 1]),
        ((2, 2), 4, [3]),
        ((4, 9), 4, []),
    ):
        chooser = Chooser(pool, MiningConfig(ranks=ranks, keep=keep), 0, near_duplicate=0.8)
        kept = chooser.choose(0, found)
        assert [n.passage for n in kept] == expected
        assert [n.rank for n in kept] == [[5, 3, 1].index(p) + 1 for p in expected]


def test_methods_take_turns_and_each_may_object(pool: Pool) -> None:
    found = {"bm25": ranking({5: 9, 3: 8, 1: 1}, 10.0), "dense": ranking({1: 0.5, 5: 0.99}, 1.0)}
    mining = MiningConfig(methods=("bm25", "dense"), model="m")
    chooser = Chooser(pool, mining, 0, near_duplicate=0.8)
    kept = chooser.choose(0, found)
    assert [(n.passage, n.method) for n in kept] == [(1, "dense"), (3, "bm25")]
    assert +chooser.tally.dropped == {"too_near_the_positive": 1}


def test_a_method_that_misses_the_positive_has_no_say(pool: Pool) -> None:
    found = {"bm25": ranking({5: 9, 3: 8}, 0.0), "dense": ranking({5: 0.5}, 1.0)}
    chooser = Chooser(
        pool, MiningConfig(methods=("bm25", "dense"), model="m"), 0, near_duplicate=0.8
    )
    assert [(n.passage, n.method) for n in chooser.choose(0, found)] == [(5, "dense")]
    assert +chooser.tally.dropped == {"positive_not_found": 1}


def test_drawn_candidates_depend_on_the_seed_alone(pool: Pool) -> None:
    found = {"bm25": ranking({5: 0.5, 3: 0.4, 1: 0.3}, 1.0)}
    orders = [
        [
            n.passage
            for n in Chooser(pool, MiningConfig(pick="random"), seed, near_duplicate=0.8).choose(
                0, found
            )
        ]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1
    assert {tuple(sorted(order)) for order in orders} == {(1, 3, 5)}
