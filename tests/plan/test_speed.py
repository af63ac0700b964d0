"""Traffic and time of a step, by hand."""

from __future__ import annotations

import pytest

from lbr_ds.config import ds_config as layout
from lbr_ds.config import load
from lbr_ds.config.ds_config import Layout
from lbr_ds.plan import Cluster, find_gpu, make_plan
from lbr_ds.plan.shape import (
    find_shape,
)
from lbr_ds.plan.speed import traffic_of
from lbr_ds.plan.work import work_of


def test_traffic_by_hand() -> None:
    """7B on 4 x 8: three times the weights over the links, their share between nodes."""
    run = load("huatuo-7b")
    shape = find_shape(run.model, run.bottleneck.count)
    work = work_of(run, 1, 32)
    assert (work.sequences, work.length, work.micro_batches) == (8, 1024, 1)
    traffic = traffic_of(shape, layout.load("zero3"), work, Cluster(4, 8, find_gpu("h100")))
    weights = 2 * shape.total
    assert traffic.links == pytest.approx(3 * weights * 31 / 32)
    assert traffic.network == pytest.approx(3 * weights * (3 / 4) / 8)
    assert traffic.host == 0


def test_second_copies_keep_all_but_the_first_gather_inside_a_node() -> None:
    """ZeRO++ with gradient caching: a step's first forward reads the network, all others do not."""
    run = load("huatuo-7b", ["stage2.micro_batch_tokens=2048"])
    shape = find_shape(run.model, run.bottleneck.count)
    work = work_of(run, 2, 32)
    assert work.cached
    numbers, times = shape.total, work.forwards + work.micro_batches
    config = layout.read("zero3_zeropp")
    vectors = 2 * work.candidates * 32 * shape.hidden * 4
    for width, reduced in ((1, 0.25), (2, 1)):  # bytes of a gathered number, share of gradients
        quantised = width == 1
        config["zero_optimization"]["zero_quantized_weights"] = quantised
        config["zero_optimization"]["zero_quantized_gradients"] = quantised
        traffic = traffic_of(shape, Layout.of("z", config), work, Cluster(4, 8, find_gpu("h100")))
        sums = 2 * reduced * work.micro_batches * numbers + vectors
        assert traffic.network == pytest.approx((width * numbers + sums) * (3 / 4) / 8)
        near = (times - 1) * width * numbers * 7 / 8
        assert traffic.links == pytest.approx((width * numbers + sums) * 31 / 32 + near)


def test_seven_billion_on_eight_h100_is_near_what_others_publish() -> None:
    """llm-foundry: 10,643 tokens/s a GPU for MPT-7B; here with recomputation."""
    result = make_plan(load("huatuo-7b"), Cluster(1, 8, find_gpu("h100")))
    (row,) = [r for r in result["layouts"] if r["ds_config"] == "zero3"]
    assert 0.7 * 10_643 <= row["stages"][0]["tokens_per_second_per_gpu"] <= 10_643
