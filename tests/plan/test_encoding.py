"""Encoding and search by hand, and how they grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import load
from lbr_ds.config.mining import searched_together
from lbr_ds.plan import Cluster, find_gpu, make_plan, pace
from lbr_ds.plan.encoding import ASSUMED, Corpus, plan_encoding
from lbr_ds.plan.flops import causal_pairs, flops
from lbr_ds.plan.shape import shape_of
from tests.mining.toy import make_run, with_mining

RECIPE = "huatuo-7b"


def planned(gpus: int, corpus: Corpus, overrides: list[str] | None = None) -> dict[str, Any]:
    run = load(RECIPE, overrides or [])
    return plan_encoding(run, shape_of(run), Cluster(1, gpus, find_gpu("h100")), corpus)


def test_by_hand() -> None:
    """A 7B forward is limited by its products; a search by products, then by reading vectors."""
    found = planned(8, Corpus(1_000_000, 100_000, 512))
    shape, gpu = shape_of(load(RECIPE)), find_gpu("h100")
    count = flops(shape, tokens=1_100_000 * 512, pairs=1_100_000 * causal_pairs(512), passes=1)
    reached = count / (8 * found["seconds"]["encode"]) / (gpu.tflops * 1e12)
    assert 0.3 < reached < gpu.matmul  # less than large products reach
    # 16 parts of 6,250 queries, two for each rank.
    products = 2 * 1e6 * 12_500 * shape.hidden
    products /= gpu.tflops * 1e12 * gpu.matmul * ASSUMED["fp32"]
    products += 1e6 * 12_500 * ASSUMED["score"] / (gpu.hbm * 1e9 * pace.ASSUMED["hbm"])
    reads = 2 * 4 * 1e6 * shape.hidden / ASSUMED["disk"]
    longest = max(products, reads)
    assert found["seconds"]["search"] == pytest.approx(longest + 12_500 * ASSUMED["sort"])
    assert found["vectors_gib"] == pytest.approx(1.1e6 * shape.hidden * 4 / 2**30)
    assert found["rankings_gib"] == pytest.approx(1e5 * 100 * 12 / 2**30)
    assert found["hours"] == pytest.approx(sum(found["seconds"].values()) / 3600)


def test_growth() -> None:
    """Ten times the passages take ten times as long; more GPUs share all but one rank's part."""
    one, ten = (planned(8, Corpus(n, n // 100, 256)) for n in (10_000_000, 100_000_000))
    assert ten["seconds"]["encode"] == pytest.approx(10 * one["seconds"]["encode"], rel=1e-3)
    assert ten["seconds"]["alone"] == pytest.approx(10 * one["seconds"]["alone"])
    more = planned(16, Corpus(10_000_000, 100_000, 256))
    assert more["seconds"]["encode"] == pytest.approx(one["seconds"]["encode"] / 2, rel=1e-3)
    assert more["seconds"]["alone"] == one["seconds"]["alone"]


def test_parts_of_a_search() -> None:
    """At least 16 unless they are small; few queries where rankings are long."""
    cases = {(10**6, 100): 8192, (100_000, 100): 6250, (700, 100): 256, (10**6, 4096): 256}
    for case, expected in {**cases, (10**6, 1 << 30): 1, (10**6, 1024): 1024}.items():
        assert searched_together(*case) == expected, case


def test_sizes_are_those_of_the_prepared_data(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    cluster, config = Cluster(1, 1, find_gpu("cpu")), load("demo")
    run = run.model_copy(update={"model": config.model, "stage1": config.stage1})
    run = run.model_copy(update={"stage2": config.stage2, "engine": config.engine})
    cl = make_plan(run, cluster)["encoding"]
    both = make_plan(with_mining(run, passages=("cl", "gl")), cluster)["encoding"]
    assert cl["passages"] == cl["queries"] == both["queries"] < both["passages"]
    given = make_plan(run, cluster, passages=9, queries=4, tokens=20)["encoding"]
    assert (given["passages"], given["queries"], given["tokens"]) == (9, 4, 20)
    assert make_plan(load(RECIPE), cluster)["encoding"] is None
    only = make_plan(load(RECIPE), cluster, passages=70)["encoding"]
    assert (only["passages"], only["queries"]) == (70, 70)
    assert only["tokens"] == load(RECIPE).model.max_length
