"""The suite `gpu`: every row's code at a tiny size, its sizes, its counts. Never how fast it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lbr_ds.bench import SUITES, Setting, gpu, models
from lbr_ds.bench.train_command import made_up
from lbr_ds.bench.workload import config_of
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.plan import find_gpu
from tests.ranks import run_cli

TARGETS = {target.measure: target for target in SUITES["gpu"].targets}
GIB = 2**30


@pytest.mark.parametrize("name", [name for name in TARGETS if not name.startswith("train_")])
def test_every_row_at_a_tiny_size(name: str) -> None:
    setting = Setting(quick=True, rounds=2)
    try:
        row = gpu.measure(TARGETS[name], setting)
    finally:
        setting.release()
    assert row.measure == name
    assert row.value is not None
    assert math.isfinite(row.value)
    assert row.value > 0
    assert row.quartiles[0] <= row.value <= row.quartiles[1]
    assert row.about


def test_targets_and_measures_are_the_same_rows() -> None:
    assert list(gpu.MEASURES) == [
        *(f"mfu_stage{number}_{size}" for size in ("0.5b", "1.5b") for number in (1, 2)),
        *(name for name in TARGETS if not name.startswith("mfu_")),
    ]
    assert set(gpu.MEASURES) == set(TARGETS)


@pytest.mark.parametrize("name", [gpu.SMALL, gpu.LARGE])
@pytest.mark.parametrize("number", [1, 2])
def test_sizes_fit_into_80_gb(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 GB neither model needs to recompute activations, if the batch is small enough."""
    monkeypatch.setattr(models, "device_bytes", lambda: models.GPU_FILL * 79.1 * GIB)
    steps = models.fitting_steps(name, number, Setting())
    assert not steps[0].checkpointing
    assert 3 <= steps[0].sequences <= (8 if name == gpu.SMALL else 4)
    assert any(step.checkpointing for step in steps)
    for step in steps:
        run = models.recipe(name, number, step, Path("x"), models.FULL)
        assert models.planned(run, number, config_of(name)) <= models.device_bytes()
    # A device that is too small for anything gets the smallest step.
    monkeypatch.setattr(models, "device_bytes", lambda: 1.0)
    assert models.fitting_steps(name, number, Setting()) == [models.STEPS[-1]]


def test_a_step_that_runs_out_of_memory_is_repeated_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [models.Step(8, False), models.Step(2, False)]
    monkeypatch.setattr(models, "fitting_steps", lambda *_: steps)
    measured = gpu._mfu_of_step

    def too_large(target, setting, name, number, step):  # type: ignore[no-untyped-def]
        if step.sequences > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(target, setting, name, number, step)

    monkeypatch.setattr(gpu, "_mfu_of_step", too_large)
    setting = Setting(quick=True, rounds=1)
    row = gpu.measure(TARGETS["mfu_stage1_0.5b"], setting)
    setting.release()
    assert "72 tokens a step" in row.about


def test_the_largest_batch_is_found_by_doubling_or_halving() -> None:
    width = 32
    need = {count: gpu.infonce_bytes(count, width, "cpu") for count in (64, 128, 256)}
    assert need[64] < need[128] < need[256]
    for start in (64, 128, 256):
        assert gpu.largest_batch(start, width, need[128]) == 128
    assert gpu.largest_batch(64, width, need[64] - 1) == 32


def test_peaks_of_devices() -> None:
    assert gpu.peak_of_device("NVIDIA H100 80GB HBM3") == find_gpu("h100").tflops * 1e12 == 989e12
    assert gpu.peak_of_device("NVIDIA H100 PCIe") == 756e12
    with pytest.raises(LookupError, match="'A toy'"):
        gpu.peak_of_device("A toy")


def test_made_up_texts_are_distinct() -> None:
    texts = [text for r in made_up(50) for text in (r["query"], r["positives"][0])]
    assert len(set(texts)) == 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_full_size_without_a_gpu_is_one_line() -> None:
    with pytest.raises(EnvironmentProblem, match="needs a CUDA device"):
        gpu.check(Setting())
    done = run_cli("bench", "gpu")
    assert done.returncode == EnvironmentProblem.exit_code
    assert done.stderr.splitlines() == [
        "lbr-ds: error: bench gpu needs a CUDA device, and torch sees none; --quick runs tiny "
        "sizes on a CPU"
    ]
