"""Groups of no mutual negatives do not chain; what is nearly the same is no negative anywhere."""

from __future__ import annotations

import random
from contextlib import closing
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
from lbr_ds.corpora.store import Store
from lbr_ds.corpora.stored import NEGATIVE, PASSAGE, POSITIVE, QUERY
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


class Plain:
    """Records, their texts and what they share, with the rules as loops over Python's objects."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.seqs = sorted(draw.sample(range(300), 200))  # some rows were dropped
        self.ids = {seq: f"r{draw.random()}" for seq in self.seqs}
        self.own = {seq: f"g{draw.randrange(20)}" * (draw.random() < 0.1) for seq in self.seqs}
        self.keys = draw.sample(range(9000), 900)
        self.family, self.cluster = [], []
        for number in range(900):
            near = draw.randrange(number) if number and draw.random() < 0.2 else number
            self.family.append(self.family[near] if near < number else number)
            same = near < number and draw.random() < 0.7
            self.cluster.append(self.cluster[near] if same else number)
        self.uses = [
            (seq, role, 0, draw.randrange(200, 900) if role == QUERY else draw.randrange(120))
            for seq in self.seqs
            for role in draw.choice([(QUERY, POSITIVE), (QUERY, NEGATIVE), (PASSAGE,)])
        ]

    def fill(self, store: Store) -> None:
        store.total = 300
        plain = {name: [""] * len(self.seqs) for name in ("source", "document_instruction")}
        store.insert(
            "records",
            seq=self.seqs,
            id=[self.ids[seq] for seq in self.seqs],
            own_group=[self.own[seq] for seq in self.seqs],
            pair=[seq % 3 > 0 for seq in self.seqs],
            **plain,
        )
        every = list(range(len(self.keys)))
        store.insert("texts", num=every, hi=[key // 10 for key in self.keys], lo=self.keys)
        store.insert("families", num=every, family=self.family, cluster=self.cluster)
        seqs, roles, places, numbers = zip(*self.uses, strict=True)
        store.insert("uses", seq=seqs, role=roles, place=places, num=numbers)

    def sharing(self, what: Any) -> list[set[int]]:
        """The records that have the same, for each value of `what` but None."""
        found: dict[Any, set[int]] = {}
        for use in self.uses:
            if (value := what(*use)) is not None:
                found.setdefault(value, set()).add(use[0])
        return list(found.values())

    def same(self) -> list[set[int]]:
        return self.sharing(lambda seq, *use: self.own[seq] or None)

    def components(self) -> list[set[int]]:
        linked = self.sharing(
            lambda seq, role, place, num: self.family[num] if role < NEGATIVE else None
        )
        return self.joined([*self.same(), *linked], 10**6)

    def groups(self, most: int) -> list[set[int]]:
        queries = self.sharing(lambda seq, role, place, num: num if role == QUERY else None)
        tied: dict[int, set[int]] = {}
        for seq, role, _, num in self.uses:
            if role < NEGATIVE:
                tied.setdefault(self.cluster[num], set()).add(seq)
        order = sorted(tied, key=lambda num: (len(tied[num]), self.keys[num]))
        whole = self.joined([*self.same(), *queries], 10**6)
        return self.joined([tied[num] for num in order], most, whole)

    def joined(
        self, links: list[set[int]], most: int, sets: list[set[int]] | None = None
    ) -> list[set[int]]:
        sets = sets or [{seq} for seq in self.seqs]
        for link in links:
            met = [one for one in sets if one & link]
            if len(met) > 1 and sum(map(len, met)) <= most:
                sets = [one for one in sets if not one & link] + [set().union(*met)]
        return sorted(sets, key=min)


@pytest.mark.parametrize(("seed", "most"), [(0, 3), (1, 4), (2, 9), (3, 1000)])
def test_components_and_groups_equal_a_plain_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, most: int
) -> None:
    plain = Plain(seed)
    monkeypatch.setattr(groups, "MAX_GROUP_SHARE", 0)
    monkeypatch.setattr(groups, "MAX_SMALL_GROUP", most)
    monkeypatch.setattr("lbr_ds.corpora.curate.near_duplicates._PAIRS_AT_ONCE", 50)
    with closing(Store(tmp_path)) as store:
        plain.fill(store)
        with store.step():
            groups.group_records(store, 7)
        members = store.rows("SELECT seq, component, grp FROM members")
        for place, kind, expected in (
            (1, "component", plain.components()),
            (2, "grp", plain.groups(most)),
        ):
            found: dict[int, set[int]] = {}
            for row in members:
                found.setdefault(row[place], set()).add(row[0])
            assert sorted(found.values(), key=min) == expected
            labels = dict(store.rows(f"SELECT {kind}, label FROM {kind.replace('grp', 'group')}s"))
            names = {
                number: min(filter(None, map(plain.own.get, seqs)), default="")
                or f"record:{min(map(plain.ids.get, seqs))}"
                for number, seqs in found.items()
            }
            assert labels == names
        counts = store.rows("SELECT component, size, pairs, draw FROM components")
    assert len(counts) == len(plain.components())
    assert {size for _, size, *_ in counts} == set(map(len, plain.components()))
    assert sum(pairs for *_, pairs, _ in counts) == sum(seq % 3 > 0 for seq in plain.seqs)
    assert len({draw for *_, draw in counts}) == len(counts)
