"""The pool on disk against one in memory; texts and negatives that other processes read."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.errors import DataError
from lbr_ds.instructions import Instructed
from lbr_ds.mining.pairs import Pairs, make_pairs
from lbr_ds.mining.pool import Pool
from lbr_ds.mining.remade import Mined
from lbr_ds.mining.stored import Lists, StoredTexts, TextWriter, digest_of
from lbr_ds.mining.vectors import cache_key
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split, write_split
from lbr_ds.shards.teacher import text_key
from tests.mining.toy import Words, pool_of

TEXTS = ["plain", "", "\u9ad8\u8840\u538b", Instructed("find: ", "a text", "record r of s"), "last"]


def drawn_records(seed: int, count: int) -> list[Record]:
    """Records that share texts, spelt differently, and groups, and some of which are passages."""
    draw = Random(seed)

    def text() -> str:
        word = draw.choice(["alpha", "Beta", "gamma, delta", "ZETA"])
        return draw.choice([word, word.upper(), f"{word} {draw.randrange(9)}!"])

    found = []
    for number in range(count):
        group = draw.choice(["", "g", "h", "i"])
        if draw.random() < 0.3:
            found.append(Record(f"r{number}", "s", group=group, text=text()))
            continue
        given = [text() for _ in range(draw.randrange(3))]
        answers = [text() for _ in range(1 + draw.randrange(3))]
        told = draw.choice(["", "say: "])
        found.append(
            Record(
                f"r{number}",
                "s",
                f"{text()}?",
                answers,
                given,
                group,
                instruction=told,
                document_instruction=told,
            )
        )
    return found


def check_equal(
    pool: Pool, targets: Sequence[Record], others: Sequence[Record], judged: Sequence[Record]
) -> None:
    """Compare a pool with the same made of dicts and sets."""
    out = {key(text) for record in judged for text in record.texts()}
    numbers: dict[bytes, int] = {}
    texts: list[str] = []
    left_out: set[bytes] = set()
    groups: dict[str, set[int]] = defaultdict(set)
    for record in (*targets, *others):
        for text in (record.text, *record.positives, *record.negatives):
            name = key(text)
            if text and name in out:
                left_out.add(name)
            elif text:
                if numbers.setdefault(name, len(texts)) == len(texts):
                    texts.append(record.instructed_passage(text))
                if text in (record.text, *record.positives):
                    groups[record.group or f"alone {record.id}"].add(numbers[name])
    asked = [record for record in targets if record.query]
    assert list(pool.passages) == [getattr(text, "text", text) for text in texts]
    assert list(pool.instructed) == texts
    assert [getattr(t, "instruction", "") for t in pool.instructed] == [
        getattr(t, "instruction", "") for t in texts
    ]
    assert list(pool.queries) == [record.query for record in asked]
    assert list(pool.asked) == [record.instructed_query() for record in asked]
    assert list(pool.ids) == [record.id for record in asked]
    assert [record.id for record in asked] == [
        record.id for record, number in zip(targets, pool.query_of, strict=True) if number >= 0
    ]
    assert pool.held_out == len(left_out)
    for number, record in enumerate(asked):
        answers = [numbers[key(t)] for t in record.positives if key(t) in numbers]
        assert pool.positives[number].tolist() == list(dict.fromkeys(answers))
        own = {numbers.get(key(t), -1) for t in (record.query, *record.negatives)} - {-1}
        own |= groups[record.group or f"alone {record.id}"]
        assert pool.banned(number).tolist() == sorted(own)


@pytest.mark.parametrize("seed", range(6))
def test_a_pool_on_disk_equals_one_in_memory(tmp_path: Path, seed: int) -> None:
    parts = [drawn_records(10 * seed + i, count) for i, count in enumerate((60, 40, 3 * seed))]
    check_equal(pool_of(tmp_path / "pool", *parts), *parts)


def test_a_pool_of_nothing(tmp_path: Path) -> None:
    judged = [Record("e", "s", "asked", ["Only"])]
    pool = pool_of(tmp_path / "pool", [Record("q", "s", "x", ["only!"])], [], judged)
    assert (list(pool.passages), pool.held_out) == ([], 1)
    assert (pool.positives[0].tolist(), pool.banned(0).tolist()) == ([], [])


def test_texts_with_instructions_come_back(tmp_path: Path) -> None:
    with TextWriter(tmp_path / "texts") as writer:
        for text in TEXTS:
            writer.append(text)
    stored = StoredTexts(tmp_path / "texts")
    for found in (stored, pickle.loads(pickle.dumps(stored))):
        assert list(found) == TEXTS
        assert found[1:4] == TEXTS[1:4]
        assert found[-1] == "last"
        one = found[3]
        assert isinstance(one, Instructed)
        assert (one.instruction, one.text, one.where) == ("find: ", "a text", "record r of s")
    bare = StoredTexts(tmp_path / "texts", bare=True)
    assert bare[3] == "a text"
    assert type(bare[3]) is str
    assert stored.digest == digest_of(TEXTS) != digest_of([str(text) for text in TEXTS])
    assert cache_key(stored, Words(), "query") == cache_key(TEXTS, Words(), "query")
    (tmp_path / "texts.utf8").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"texts\.utf8: ends before byte"):
        StoredTexts(tmp_path / "texts")[2]


def test_records_with_negatives_are_read_by_number(tmp_path: Path) -> None:
    """In any order, with several shards, and in another process."""
    records = drawn_records(5, 45)
    records[4] = replace(
        records[4], text="", query="q", positives=["p"], negatives=["n"], negative_scores=[0.5]
    )
    shards = write_split(tmp_path / "data", "cl", records, seed=3, records_per_shard=10)
    Manifest(tmp_path / "data", {"cl": shards}, [], 3, "0" * 16, "test").save()
    pool = pool_of(tmp_path / "pool", records)
    draw = np.random.default_rng(0)
    chosen = [draw.integers(0, len(pool.passages), draw.integers(0, 4)) for _ in pool.queries]
    items = np.concatenate(chosen)
    lists = Lists(items, np.cumsum([len(each) for each in chosen]))
    in_order = list(read_split(tmp_path / "data", "cl"))
    again = pool_of(tmp_path / "in-order", in_order)
    mined = Mined.of(tmp_path / "data", "cl", again, lists)
    found = iter(chosen)
    expected = []
    for record in in_order:
        more = [again.passages[int(n)] for n in next(found)] if record.query else []
        scores = [] if more else record.negative_scores
        negatives = [*record.negatives, *more]
        expected.append(replace(record, negatives=negatives, negative_scores=scores))
    assert list(mined) == expected
    order = Random(1).sample(range(45), 45)
    part = mined.part(order).part(range(7, 31))
    for same in (part, pickle.loads(pickle.dumps(part))):
        assert list(same) == [expected[order[place]] for place in range(7, 31)]


@pytest.mark.parametrize("seed", [1, 2])
def test_pairs_on_disk_are_those_of_the_records(tmp_path: Path, seed: int) -> None:
    records = drawn_records(seed, 50)
    asked = [record for record in records if record.query]
    (tmp_path / "pairs").mkdir()
    make_pairs(tmp_path / "pairs", records)
    pairs = Pairs(tmp_path / "pairs")
    told = [record.instructed_query() for record in asked]
    passages = [
        record.instructed_passage(text)
        for record in asked
        for text in (*record.positives, *record.negatives)
    ]
    assert list(pairs.queries) == list(dict.fromkeys(told))
    assert list(pairs.passages) == list(dict.fromkeys(passages))
    assert [pairs.queries[number] for number in pairs.query_of.tolist()] == told
    assert [pairs.passages[n] for own in pairs.passages_of for n in own.tolist()] == passages
    assert pairs.positives.tolist() == [len(record.positives) for record in asked]
    places = pairs.pairs_of.tolist()
    assert [place >= 0 for place in places] == [bool(record.query) for record in records]
    keys = [text_key(text, "query") for text in pairs.queries]
    assert pairs.keys.tolist() == keys + [text_key(text, "document") for text in pairs.passages]
    flat = [
        (record.query, text) for record in asked for text in (*record.positives, *record.negatives)
    ]
    assert pairs.count == len(flat)
    assert list(pairs.bare(0, len(flat))) == flat
    assert list(pairs.bare(7, 23)) == flat[7:23]
