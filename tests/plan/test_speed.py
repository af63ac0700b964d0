"""Traffic of a step by hand, and its time against measured steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import ds_config as layout
from lbr_ds.config import load
from lbr_ds.config.ds_config import Layout
from lbr_ds.plan import Cluster, find_gpu, make_plan, pace
from lbr_ds.plan.fit import memory_on
from lbr_ds.plan.flops import bottleneck_pairs
from lbr_ds.plan.gpus import gpu_of_device
from lbr_ds.plan.shape import (
    find_shape,
    known_backbones,
    shape_of,
    shape_of_config,
)
from lbr_ds.plan.speed import step_time, traffic_of
from lbr_ds.plan.work import Work, work_of
from lbr_ds.system.yaml_json import read_yaml


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


MEASURED = read_yaml(Path(__file__).with_name("h100.yaml"), "measured steps")
MOVES = {"eager": pace.ASSUMED["moves"], "liger": 8.7}


@pytest.mark.parametrize(
    "row", MEASURED["rows"], ids=lambda r: f"{r['backbone']}-{r['layout']}-{r['kernels']}"
)
def test_measured_steps_are_predicted_within_a_quarter(row: dict[str, Any]) -> None:
    """Steps on an H100, with the FLOPs that were reported for them."""
    batch, count = MEASURED["batches"][row["batch"]], MEASURED["batches"][row["batch"]]["sequences"]
    context, target, rows = batch["context"], batch["target"], 4
    (entry,) = [e for name, e in known_backbones().items() if row["backbone"] in name]
    shape = shape_of_config(entry["config"], row["backbone"])
    work = Work(
        stage=1,
        sequences=count,
        length=context + target,
        supervised=target,
        copies=rows,
        pairs=float(bottleneck_pairs(context - rows, rows, target)),
        packed=count,
        micro_batches=1,
        cached=False,
        queries=0,
        candidates=0,
    )
    gpu, checkpointing = gpu_of_device(MEASURED["device"]), bool(row.get("checkpointing"))
    assert gpu is not None
    if row["layout"]:
        one = Cluster(1, 1, gpu)
        planned = step_time(shape, layout.load(row["layout"]), work, one, checkpointing).seconds
    else:  # forward and backward in plain torch, without an update
        device = pace.device_seconds(
            shape, work, gpu, width=2, checkpointing=checkpointing, moves=MOVES[row["kernels"]]
        )
        planned = pace.busy_seconds(shape, work, device, 0, checkpointing=checkpointing)
    assert planned == pytest.approx(row["seconds"], rel=0.25)
    if "mfu" in row:
        useful = work.useful_flops(shape) / (gpu.tflops * 1e12)
        assert useful / row["seconds"] == pytest.approx(row["mfu"], rel=0.02)


def test_a_backward_that_takes_turns_adds_device_and_host() -> None:
    """By hand, on both sides of where the host is the slower one."""
    run = load("huatuo-7b", ["stage1.micro_batch_tokens=2048"])
    shape, work = shape_of(run), work_of(run, 1, 32)
    layers = shape.layers * work.micro_batches
    for stage, turns in ((2, True), (3, False)):
        host = pace.HOST[stage]
        assert host.takes_turns is turns
        forward, backward = layers * host.forward, layers * (host.forward + host.backward)
        for share in (0.5, 2.0):
            busy = pace.Busy(forward=share * forward, backward=share * backward)
            found = pace.busy_seconds(shape, work, busy, stage, checkpointing=True)
            larger = max(1.0, share)
            both = larger * forward + (1 + share) * backward
            assert found == pytest.approx(both if turns else larger * (forward + backward))


def test_a_replayed_batch_is_planned_as_stage_1() -> None:
    """In micro-batches of stage 2; on one GPU the times add up, and the larger memory counts."""
    keys = ["stage1.micro_batch_tokens=4096", "stage2.micro_batch_tokens=4096"]
    run, apart = (load("huatuo-7b", [*keys, f"stage2.generative={w}"]) for w in (0.1, 0))
    joint, own, replayed = work_of(run, 2, 1), work_of(apart, 2, 1), work_of(apart, 1, 1)
    assert joint == replace(own, replay=replayed)
    auto = ["stage1.micro_batch_tokens=auto", *keys[1:], "stage2.generative=0.1"]
    assert work_of(load("huatuo-7b", auto), 2, 1) == joint
    shape = find_shape(run.model, run.bottleneck.count)
    zero2, cluster = layout.load("zero2"), Cluster(1, 1, find_gpu("h100"))
    both, *parts = (step_time(shape, zero2, w, cluster, True) for w in (joint, own, replayed))
    assert both.seconds - both.optimizer == pytest.approx(
        sum(part.seconds - part.optimizer for part in parts)
    )
    most, *peaks = (memory_on(run, shape, zero2, w, cluster, True) for w in (joint, own, replayed))
    assert most.peak == max(memory.peak for memory in peaks)
