"""Random weights for benchmarks."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lbr_ds.cluster.synthetic import write_backbone
from lbr_ds.config import load
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.plan.shape import (
    find_shape,
)


def test_no_room_for_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("huatuo-7b")
    shape = find_shape(run.model, run.bottleneck.count)
    free = 2 * shape.total - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    with pytest.raises(EnvironmentProblem, match=r"13\.5 GB free, 13\.5 needed .+ larger disk"):
        write_backbone(shape, run, tmp_path)
    assert not list(tmp_path.iterdir())
