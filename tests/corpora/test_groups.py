"""Groups of no mutual negatives do not chain; what is nearly the same is no negative anywhere."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lbr_ds.batching import TextEncoder
from lbr_ds.batching.contrastive import contrastive_pairs
from lbr_ds.corpora.curate import groups
from lbr_ds.corpora.curate.clusters import stars
from lbr_ds.corpora.curate.near_duplicates import Shared, signature
from lbr_ds.corpora.curate.segmentation import likeness, shingles
from lbr_ds.corpora.prepare import prepare
from lbr_ds.mining.pool import Pool
from lbr_ds.records import Record
from tests.corpora.test_near_duplicates import altered, leaky, prose
from tests.corpora.toy import pair, read_all, recipe
from tests.tiny import backbone

TEMPLATE = prose(random.Random(9), 60)


def templated(count: int = 120) -> list[dict[str, Any]]:
    """Documents of three records; one answer of each is a template with two words filled in."""
    draw = random.Random(4)
    raws = []
    for i in range(count):
        filled = f"{TEMPLATE} word{i} {TEMPLATE.split()[0]} word{i + 1}"
        for part, answer in enumerate((prose(draw, 30), prose(draw, 30), filled)):
            raw = pair(10 * i + part, query=prose(draw, 9), positives=[answer], group=f"d{i}")
            raws.append(raw)
    return raws


def test_a_template_ties_the_split_and_not_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raws = [*templated(), *map(pair, range(5000, 5400))]
    data = recipe(tmp_path, raws)
    made = prepare(data, 0)
    assert made["components"]["largest"] == 360
    assert made["groups"] == {
        "count": 520,
        "largest": 3,
        "kin": 1,
        "largest_kin": 120,
        "near_pairs": {"looked_at": 32 * 119, "share_a_group": 0, "never_negatives": 32 * 119},
    }
    splits = read_all(data.folder)
    records = {r.id: r for rs in splits.values() for r in rs}
    assert {records[f"r{10 * i + 2}"].group for i in range(120)} == {f"d{i}" for i in range(120)}
    ((label,),) = {tuple(records[f"r{10 * i + 2}"].kin) for i in range(120)}
    assert label
    assert not any(records[f"r{10 * i + part}"].kin for i in range(120) for part in (0, 1))

    # Where a group may be so large, the tie makes one group and needs no label.
    monkeypatch.setattr(groups, "SMALL", 360)
    made = prepare(recipe(tmp_path, raws, records_per_shard=7), 0)
    assert (made["groups"]["largest"], made["groups"]["kin"]) == (360, 0)


def test_planted_copies_share_a_group(tmp_path: Path) -> None:
    raws, tied = leaky()
    data = recipe(tmp_path, raws)
    prepare(data, 0)
    group = {r.id: r.group for records in read_all(data.folder).values() for r in records}
    assert [group[one] for one in tied] == [group[other] for other in tied.values()]
    assert len(set(group.values())) == len(raws) - len(tied)


def test_stars_are_near_to_their_leader(tmp_path: Path) -> None:
    """Whatever the numbers of the texts; and leaders are not near to each other."""
    draw = random.Random(5)
    base = prose(draw, 60)
    texts = [base]
    for _ in range(60):  # a chain: each step is near to the last, the ends are not
        texts.append(altered(texts[-1], draw, 0.04))
    clusters = []
    for seed in range(2):
        order = sorted(texts)
        random.Random(seed).shuffle(order)
        (tmp_path / "signatures").write_bytes(b"".join(map(signature, order)))
        family = np.array(sorted(range(len(order)), key=order.__getitem__))
        shared = Shared(tmp_path / "signatures", 0.7, order.__getitem__)
        pairs = [pair for part in stars(shared, iter([family])) for pair in part]
        clusters.append({order[number]: order[leader] for number, leader in pairs})
    assert clusters[0] == clusters[1]
    assert set(clusters[0]) == set(texts)
    words = {text: shingles(text) for text in texts}
    assert all(likeness(words[text], words[other]) >= 0.7 for text, other in clusters[0].items())
    leaders = set(clusters[0].values())
    assert 1 < len(leaders) < len(texts)
    assert all(likeness(words[a], words[b]) < 0.7 for a, b in combinations(leaders, 2))


def kindred() -> list[Record]:
    """Four records: 0 and 1 have an answer of one label, 1 and 2 a group."""
    return [
        Record("0", "toy", "ask a", ["say one", "say two"], kin=["", "label"]),
        Record("1", "toy", "ask b", ["say three"], group="g", kin=["label"]),
        Record("2", "toy", "ask c", ["say four"], group="g"),
        Record("3", "toy", "ask d", ["say five"]),
    ]


def test_kin_is_no_negative_in_training(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone(tmp_path))
    encoder = TextEncoder(tokenizer, max_length=32, num_bottleneck=0)
    pairs = contrastive_pairs(kindred(), [1, 0, 0, 0], encoder, 0)
    no_negative = (pairs.known[:, :, None] == pairs.text).any(1)
    assert no_negative.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    # Another answer of record 0 is drawn: only its kin is alike.
    pairs = contrastive_pairs(kindred(), [0, 0, 0, 0], encoder, 0)
    no_negative = (pairs.known[:, :, None] == pairs.text).any(1)
    assert no_negative[1].tolist() == [False, True, False, False]


def test_kin_is_never_mined() -> None:
    pool = Pool.of(kindred(), [], [])
    texts = [{pool.passages[n] for n in pool.banned(q)} for q in range(4)]
    assert texts == [
        {"say one", "say two", "say three"},
        {"say two", "say three", "say four"},
        {"say three", "say four"},
        {"say five"},
    ]
