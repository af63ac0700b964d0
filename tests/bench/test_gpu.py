"""The suite `gpu` where there is no GPU: its rows, its faults, its counts."""

from __future__ import annotations

import json

import pytest
import torch

from lbr_ds.bench import Row, as_result, gpu
from lbr_ds.cli.bench import show_bench
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.plan import find_gpu
from tests.benchmarks.texts import TINY
from tests.ranks import run_cli


def test_gpu_rows_without_a_gpu_and_with_faults() -> None:
    def fails(wanted: gpu.Wanted) -> Row:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    row = gpu.guarded(gpu.Wanted("m", 1.0, 2.0, "higher"), fails)
    assert row.value is None
    assert row.about == "not measured: OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert json.loads(json.dumps(as_result("gpu", [row])))["rows"][0]["value"] is None
    show_bench(as_result("gpu", [row]))
    assert gpu.peak_flops("NVIDIA H100 80GB HBM3") == find_gpu("h100").tflops * 1e12 == 989e12
    assert gpu.peak_flops("NVIDIA H100 PCIe") == 756e12
    with pytest.raises(LookupError, match="'A toy'"):
        gpu.peak_flops("A toy")
    assert gpu.infonce_bytes(64, 8, "cpu") > 0
    for make in (gpu.stage1_step, gpu.stage2_step):
        batch, _, work = make(TINY)
        assert batch.num_tokens >= gpu.STEP_TOKENS
        assert work > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_suite_without_a_gpu_is_one_line() -> None:
    with pytest.raises(EnvironmentProblem, match="needs a CUDA device"):
        gpu.suite()
    done = run_cli("bench", "gpu")
    assert done.returncode == EnvironmentProblem.exit_code
    assert len(done.stderr.splitlines()) == 2  # the suite's name and the line
