"""The suite `host` at a tiny size, and what it compares: two ways of taking the same step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from lbr_ds.batching import pack
from lbr_ds.bench import SUITES
from lbr_ds.bench.host import LENGTH, engine_on, engine_side, loss_of, plain_side, write_model
from lbr_ds.bench.workload import embedder, ib, random_model
from tests.ranks import run_cli


def test_every_row_at_a_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    done = run_cli("bench", "host", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["measure"] for row in rows] == [t.measure for t in SUITES["host"].targets]
    for row in rows:
        assert math.isfinite(row["value"])
        assert row["value"] > 0
        assert row["better"] == "lower"


def test_both_sides_have_the_same_gradient(tmp_path: Path) -> None:
    """Of a whole step: one micro-batch that is not the last, and the last one."""
    config = write_model(tmp_path, 2)
    batch = pack([ib(LENGTH, LENGTH, config["vocab_size"])])
    model = embedder(random_model(config, "cpu", torch.bfloat16))
    plain_side(model, batch).micro_batch()
    loss_of(model(batch), batch).backward()
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    wanted = torch.stack([slope.float().norm() for slope in slopes]).norm().item()
    for layout in ("zero1", "zero2", "zero3"):
        with engine_on(tmp_path, layout) as engine:
            engine_side(engine, batch).micro_batch()
            engine.backward(loss_of(engine.forward(batch), batch), last=True)
            norm, applied = engine.step(1e-6)
        assert applied
        assert math.isclose(norm, wanted, rel_tol=5e-3), layout  # bf16
