"""The suites of training at a tiny size: their rows, their oracles, the plot. Never a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lbr_ds.batching import Sequence
from lbr_ds.bench import Row, as_result
from lbr_ds.bench.workload import embedder, random_model
from lbr_ds.cli.bench import show_bench
from tests.benchmarks import attention, peers, stage1
from tests.benchmarks.plot import QUICK, draw, sweep
from tests.benchmarks.texts import TINY
from tests.dense import dense_mask


def check(rows: list[Row], wanted: dict[str, tuple[float, float]]) -> None:
    assert {row.measure: (row.floor, row.goal) for row in rows} == {
        name: (floor, pytest.approx(goal)) for name, (floor, goal) in wanted.items()
    }
    for row in rows:
        assert row.value is not None
        assert math.isfinite(row.value)
        assert row.quartiles[0] <= row.value <= row.quartiles[1]


@pytest.mark.slow
def test_stage1_rows() -> None:
    rows = stage1.suite(**stage1.QUICK)
    by_name = {row.measure: row for row in rows}
    flop_ratio = {n: by_name[f"reconstruct_over_pt_{n}"].theory or 0 for n in (12, 16)}
    assert all(1.5 < value < 2.5 for value in flop_ratio.values())
    check(
        rows,
        {
            "ib_sft_over_sft_8": (1.03, 1.01),
            "ib_sft_over_sft_16": (1.00, 0.97),
            "reconstruct_over_pt_12": (2.1, 1.05 * flop_ratio[12]),
            "reconstruct_over_pt_16": (2.1, 1.05 * flop_ratio[16]),
            "ib_over_dense_mask_16": (0.85, 0.70),
            "packed_over_padded_of_ideal": (0.85, 0.95),
            "head_loss_memory": (0.30, 0.15),
            "head_loss_time": (1.05, 1.0),
            "head_loss_memory_width_32": (0.30, 0.15),
            "head_loss_time_width_32": (1.05, 1.0),
        },
    )
    show_bench(as_result("stage1", rows))


def test_attention_rows() -> None:
    rows = attention.suite(**attention.QUICK)
    check(
        rows,
        {
            "ib_attention_over_dense_16": (0.6, 0.4),
            "ib_attention_over_causal_16": (0.9, 0.7),
            "packed_attention_over_loop": (1.0, 0.7),
        },
    )


def test_the_dense_way_has_the_oracles_mask_and_refuses_another_loss() -> None:
    sequence = Sequence([0] * 9, 3, [0] * 5)
    assert torch.equal(stage1.dense_ib_mask(sequence), dense_mask([sequence]))
    model = embedder(random_model(TINY))
    sequence = Sequence(list(range(9)), 3, list(range(5)))
    stage1.dense_loss(model, sequence)
    with pytest.raises(RuntimeError, match="disagree on the loss"):
        stage1.padded_loss(model, [sequence], 20)  # plain causal there: not what `cut` means


def test_lengths_fill_about_half() -> None:
    for count in (4, 16):
        lengths = stage1.spread_lengths(512, count)
        assert max(lengths) == 512
        assert sum(lengths) / (512 * count) == pytest.approx(0.5, abs=0.05)


def test_peer_batch_is_the_same_task() -> None:
    sequences = [Sequence([5, 6, 7, 1, 2], 2, [8, 9]), Sequence([3, 1, 2], 2, [4])]
    batch = peers.dense_batch(sequences)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2, 8, 9], [3, 1, 2, 4, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [-100, -100, -100, 4, -100, -100, -100]
    for i, sequence in enumerate(sequences):
        n = len(sequence)
        assert torch.equal(batch["attention_mask"][i, 0, :n, :n], dense_mask([sequence]))
    assert batch["attention_mask"].any(-1).all()  # a row that sees nothing would be NaN
    peers.compare(([1.0, 2.0], [1.0]))
    with pytest.raises(RuntimeError, match="not the same task"):
        peers.compare(([2.0], [2.01]))


@pytest.mark.slow
def test_plot_is_drawn(tmp_path: Path) -> None:
    points = sweep(**QUICK)
    assert len(points) == 3 * 3
    assert all(p["seconds"] > 0 and p["mib"] > 0 for p in points)
    for name in ("steps.png", "steps.html"):
        draw(points, tmp_path / name, "this machine")
        assert (tmp_path / name).stat().st_size > 10_000
