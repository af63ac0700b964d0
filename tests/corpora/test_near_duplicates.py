"""Near duplicates: found as brute force finds them, kept in one split, and proved to be."""

from __future__ import annotations

import random
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from datasketch import MinHash

from lbr_ds.corpora.curate.near_duplicates import (
    PERMUTATIONS,
    Comparison,
    families,
    signature,
)
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import DataError
from tests.corpora.toy import pair, read_all, recipe

MIXED = "\u4e2d\u6587\u5b57\u7b26 and Stra\u00dfe \u0e01\u0e32\u0e23"
WORDS = [f"word{number}" for number in range(3000)]


def prose(draw: random.Random, length: int) -> str:
    return " ".join(draw.choices(WORDS, k=length))


def altered(text: str, draw: random.Random, share: float) -> str:
    """The text with that share of its words replaced."""
    words = text.split()
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = draw.choice(WORDS)
    return " ".join(words)


def test_families_equal_brute_force(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts: list[str] = []
    for _ in range(60):
        base = prose(draw, draw.randint(3, 80))
        copies = [altered(base, draw, share) for share in (0.02, 0.05, 0.1, 0.2, 0.4)]
        texts += [base, *draw.sample(copies, draw.randint(0, 5))]
    (tmp_path / "signatures").write_bytes(b"".join(map(signature, texts)))
    found = families(Comparison(tmp_path / "signatures", 0.7, texts.__getitem__), len(texts))

    roots = list(range(len(texts)))  # the oracle: all pairs, relabelled
    sets = [shingles(text) for text in texts]
    for one, other in combinations(range(len(texts)), 2):
        if jaccard(sets[one], sets[other]) >= 0.7 and roots[one] != roots[other]:
            low, high = sorted((roots[one], roots[other]))
            roots = [low if root == high else root for root in roots]
    assert [found.root(number) for number in range(len(texts))] == roots
    assert 60 <= len(set(roots)) < len(texts)


def test_a_signature_is_the_same_everywhere() -> None:
    assert signature("Same  text.") == signature("same text")
    assert signature("one")[:8].hex() == "604aaf330ae0fc9a"


@pytest.mark.parametrize("text", ["one", "", "...", "Two words", "words " * 300, MIXED])
def test_signature_is_datasketchs(text: str) -> None:
    def hashed(data: bytes) -> int:
        return int.from_bytes(blake2b(data, digest_size=4).digest(), "little")

    theirs = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=hashed, scheme="affine32")
    theirs.update_batch([run.encode() for run in shingles(text)])
    assert signature(text) == theirs.hashvalues.astype("<u4").tobytes()


@pytest.mark.parametrize(
    ("text", "other", "near"),
    [
        ("a b c d e f g h i j", "a b c d x f g h i j", False),  # one word of ten
        ("a b c d e f g h i j k", "a b c d x f g h i j k", True),  # of eleven
        (
            "\u60a3\u8005\u4e3b\u8bc9\u80f8\u75db\u4e24\u5929\u4f34\u6709\u53d1\u70ed",
            "\u60a3\u8005\u4e3b\u8bc9\u80f8\u75db\u4e09\u5929\u4f34\u6709\u53d1\u70ed",
            False,
        ),
        (
            "".join(map(chr, range(0x4E00, 0x4E18))),
            "\u75c5" + "".join(map(chr, range(0x4E01, 0x4E18))),
            False,
        ),  # one character of 24
        (
            "".join(map(chr, range(0x4E00, 0x4E19))),
            "\u75c5" + "".join(map(chr, range(0x4E01, 0x4E19))),
            True,
        ),  # of 25
        ("type 1", "type 2", False),
    ],
)
def test_what_is_near(text: str, other: str, near: bool) -> None:
    assert (jaccard(shingles(text), shingles(other)) >= 0.7) == near


def leaky(count: int = 150) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records of which half has a copy under another id, in other clothes or 5 % altered; and
    the pairs of ids that must not part."""
    draw = random.Random(1)
    raws, tied = [], {}
    for i in range(count):
        answer, query = prose(draw, draw.randint(20, 60)), prose(draw, 12)
        raws.append(pair(i, query=query, positives=[answer]))
        if i % 4 == 0:
            shouted = "  ".join(answer.upper().split()) + " !"
            raws.append(pair(i + 1000, query=prose(draw, 9), positives=[shouted]))
        elif i % 4 == 2:
            near = altered(answer, draw, 0.05)
            raws.append(pair(i + 1000, query=prose(draw, 9), positives=[near]))
        else:
            continue
        tied[f"r{i}"] = f"r{i + 1000}"
    return raws, tied


def test_planted_copies_stay_in_one_split(tmp_path: Path) -> None:
    raws, tied = leaky()
    data = recipe(tmp_path, raws, splits={"gl": 0.4, "cl": 0.3, "eval": 0.3})
    made = prepare(data, 0)
    place = {r.id: name for name, records in read_all(data.folder).items() for r in records}
    assert len(place) == len(raws)
    assert [place[one] for one in tied] == [place[other] for other in tied.values()]
    assert set(made["leaks"].values()) == {0}
    assert made["components"]["tied_records"] == 2 * len(tied)
    assert made["components"]["near_duplicate_texts"] == len(tied) // 2

    # Without the rule they do part: the test above is no accident.
    loose = recipe(tmp_path, raws, near_duplicate=1, splits={"gl": 0.4, "cl": 0.3, "eval": 0.3})
    made = prepare(loose, 0)
    place = {r.id: name for name, records in read_all(data.folder).items() for r in records}
    assert [place[one] for one in tied] != [place[other] for other in tied.values()]


def test_proof_sees_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records divided as if nothing were near: the proof refuses the shards."""
    from lbr_ds.corpora.curate import groups
    from lbr_ds.corpora.store import Store

    whole = groups.group_records

    def blind(store: Store, seed: int) -> None:
        store.db.execute("CREATE TEMP TABLE kept AS SELECT * FROM families")
        store.db.execute("UPDATE families SET family = num, cluster = num")
        whole(store, seed)
        store.db.execute("DELETE FROM families")
        store.db.execute("INSERT INTO families SELECT * FROM kept")

    monkeypatch.setattr("lbr_ds.corpora.prepare.group_records", blind)
    with pytest.raises(DataError, match=r"'eval_gl': 0, 'eval_cl': 0, 'near_eval_gl': [1-9]"):
        prepare(recipe(tmp_path, leaky()[0]), 0)


def test_near_negatives_are_parted_too(tmp_path: Path) -> None:
    raws, _ = leaky()
    draw = random.Random(2)
    for raw, other in zip(raws, raws[7:], strict=False):
        raw["negatives"] = [altered(other["positives"][0], draw, 0.05)]
    made = prepare(recipe(tmp_path, raws), 0)
    assert set(made["leaks"].values()) == {0}
    assert made["dropped_texts"]["negative_is_in_other_split"]["count"] > 20


def test_twins_are_dropped(tmp_path: Path) -> None:
    draw = random.Random(3)
    raws = [pair(i, query=prose(draw, 30), positives=[prose(draw, 60)]) for i in range(40)]
    twin = {**raws[5], "id": "twin", "query": altered(raws[5]["query"], draw, 0.03)}
    other = {**raws[6], "id": "other", "query": prose(draw, 30)}
    data = recipe(tmp_path, [*raws, twin, other])
    dropped = prepare(data, 0)["dropped_records"]
    assert dropped["near_duplicate"]["count"] == 1
    assert dropped["near_duplicate"]["examples"][0].startswith("twin: ")
    assert sum(len(records) for records in read_all(data.folder).values()) == 41
