"""Measures of the vector space against their definitions, written out pair by pair."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lbr_ds.evaluation import geometry
from lbr_ds.evaluation.documents import Documents
from lbr_ds.system import blocks


@pytest.fixture
def space() -> tuple[np.ndarray, np.ndarray, list[list[int]], list[list[int]]]:
    """7 queries, 23 passages in 5 dimensions; two own passages for some, group mates for others."""
    rng = np.random.default_rng(0)
    queries, passages = (geometry.normalised(rng.normal(size=(n, 5))) for n in (7, 23))
    own = [[i, i + 7] if i % 2 else [i] for i in range(7)]
    mates = [[*own[i], 20, 21] if i > 3 else [] for i in range(7)]
    return queries, passages, own, mates


def test_separation_ratio_is_its_definition(space) -> None:  # type: ignore[no-untyped-def]
    queries, passages, own, mates = space
    near, far = [], []
    for i, query in enumerate(queries):
        distance = [1 - float(query @ p) for p in passages]
        near.append(np.mean([distance[j] for j in own[i]]))
        apart = {*own[i], *mates[i]}
        far.append(np.mean([d for j, d in enumerate(distance) if j not in apart]))
    expected = np.mean(far) / np.mean(near)
    assert geometry.separation_ratio(*space) == pytest.approx(expected, rel=1e-5)
    without = [list(m) for m in own]
    assert geometry.separation_ratio(queries, passages, own, without) != pytest.approx(expected)


def test_separation_ratio_at_its_ends() -> None:
    eye = np.eye(4, dtype=np.float32)
    own = [[0], [1], [2], [3]]
    assert geometry.separation_ratio(eye, eye, own, [[]] * 4) == math.inf
    assert geometry.separation_ratio(eye, eye, [[1], [2], [3], [0]], own) == pytest.approx(1)
    assert math.isnan(geometry.separation_ratio(eye[:1], eye[:1], [[0]], [[]]))
    everything = [list(range(4))] * 4
    assert math.isnan(geometry.separation_ratio(eye, eye, own, everything))


def test_alignment_and_uniformity_are_their_definitions(space, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    queries, passages, own, _ = space
    pairs = [float(np.square(queries[i] - passages[j]).sum()) for i in range(7) for j in own[i]]
    kernel = [
        math.exp(-2 * float(np.square(passages[i] - passages[j]).sum()))
        for i in range(23)
        for j in range(i)
    ]
    for tile in (2, 5, 23, 100):
        monkeypatch.setattr(geometry, "_TILE", tile)
        assert geometry.alignment(queries, passages, own) == pytest.approx(np.mean(pairs), rel=1e-5)
        expected = math.log(np.mean(kernel))
        assert geometry.uniformity(passages) == pytest.approx(expected, rel=1e-5)
    assert geometry.uniformity(np.ones((9, 1), np.float32)) == pytest.approx(0)


def test_effective_rank_is_that_of_the_singular_values(space, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    passages = space[1]
    singular = np.linalg.svd(passages.astype(np.float64), compute_uv=False)
    shares = singular / singular.sum()
    monkeypatch.setattr(geometry, "_TILE", 4)
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert geometry.effective_rank(passages) == pytest.approx(expected, rel=1e-6)
    assert geometry.effective_rank(np.eye(6)) == pytest.approx(6)
    assert geometry.effective_rank(np.ones((6, 3))) == pytest.approx(1)
    assert math.isnan(geometry.effective_rank(np.zeros((6, 3))))


def test_measure_normalises_and_says_none(space) -> None:  # type: ignore[no-untyped-def]
    queries, passages, own, mates = space
    plain = geometry.measure(queries, passages, own, mates)
    assert set(plain) == {"separation_ratio", "alignment", "uniformity", "effective_rank"}
    assert geometry.measure(3 * queries, 7 * passages, own, mates) == pytest.approx(plain)
    alone = geometry.measure(queries[:1], queries[:1], [[0]], [[]])
    assert alone["separation_ratio"] is None
    assert alone["uniformity"] is None
    assert alone["alignment"] == 0


def test_rows_on_disk_have_the_measures_of_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the last digit, in whatever parts they were stored and are read."""
    monkeypatch.setattr(geometry, "_TILE", 64)
    monkeypatch.setattr(blocks, "ROWS", 50)
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(731, 48)).astype(np.float32)
    queries = (passages[:90] + rng.normal(size=(90, 48))).astype(np.float32)
    own, mates = [[i, i + 90] for i in range(90)], [[i, 700] for i in range(90)]
    names = [f"d{number}" for number in range(731)]
    documents = Documents()
    for first, last in ((0, 20), (20, 20), (10, 300), (300, 349), (349, 350), (350, 731)):
        documents.add(names[first:last], passages[first:last])
    order = rng.permutation(731)
    rows = documents.rows([names[number] for number in order])
    assert np.array_equal(rows[:], passages[order])
    assert np.array_equal(documents["d349"], passages[349])
    place = np.argsort(order)
    turned = [[[int(place[i]) for i in each] for each in which] for which in (own, mates)]
    expected = geometry.measure(queries, passages[order], *turned)
    assert geometry.measure(queries, rows, *turned) == expected
    assert None not in expected.values()
    unit = geometry._Normalised(rows)
    whole = geometry.normalised(passages[order])
    assert (geometry._sum(unit) == whole.sum(0, dtype=np.float64)).all()
    for function in (geometry.separation_ratio, geometry.alignment):
        given = turned if function is geometry.separation_ratio else turned[:1]
        unit_queries = geometry.normalised(queries)
        assert function(unit_queries, unit, *given) == function(unit_queries, whole, *given)
    assert geometry.effective_rank(unit) == geometry.effective_rank(whole)
