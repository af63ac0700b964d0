"""Groups of no mutual negatives do not chain; what is nearly the same is no negative anywhere."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.corpora.curate import groups
from lbr_ds.corpora.curate.clusters import cluster_families
from lbr_ds.corpora.curate.near_duplicates import Comparison, signature
from lbr_ds.corpora.curate.segmentation import jaccard, shingles
from lbr_ds.corpora.prepare import prepare
from tests.corpora.test_near_duplicates import altered, leaky, prose
from tests.corpora.toy import pair, read_all, recipe

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
        "near_pairs": {"looked_at": 32 * 119, "share_a_group": 0},
    }
    splits = read_all(data.folder)
    records = {r.id: r for rs in splits.values() for r in rs}
    assert {records[f"r{10 * i + 2}"].group for i in range(120)} == {f"d{i}" for i in range(120)}

    # Where a group may be so large, the tie makes one group.
    monkeypatch.setattr(groups, "MAX_SMALL_GROUP", 360)
    made = prepare(recipe(tmp_path, raws, records_per_shard=7), 0)
    assert made["groups"]["largest"] == 360


def test_planted_copies_share_a_group(tmp_path: Path) -> None:
    raws, tied = leaky()
    data = recipe(tmp_path, raws)
    prepare(data, 0)
    group = {r.id: r.group for records in read_all(data.folder).values() for r in records}
    assert [group[one] for one in tied] == [group[other] for other in tied.values()]
    assert len(set(group.values())) == len(raws) - len(tied)


def test_clusters_are_near_to_their_leader(tmp_path: Path) -> None:
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
        comparison = Comparison(tmp_path / "signatures", 0.7, order.__getitem__)
        pairs = [pair for part in cluster_families(comparison, iter([family])) for pair in part]
        clusters.append({order[number]: order[leader] for number, leader in pairs})
    assert clusters[0] == clusters[1]
    assert set(clusters[0]) == set(texts)
    words = {text: shingles(text) for text in texts}
    assert all(jaccard(words[text], words[other]) >= 0.7 for text, other in clusters[0].items())
    leaders = set(clusters[0].values())
    assert 1 < len(leaders) < len(texts)
    assert all(jaccard(words[a], words[b]) < 0.7 for a, b in combinations(leaders, 2))
