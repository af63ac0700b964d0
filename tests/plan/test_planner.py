"""All layouts together, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbr_ds.config import load
from lbr_ds.errors import ConfigError
from lbr_ds.plan import Cluster, find_gpu, make_plan
from tests.ranks import run_cli


def test_best_is_the_fastest_that_fits() -> None:
    """1 GPU of 80 GB: 7B in bf16 with fp32 states needs 16 bytes a number, so only offload fits."""
    run = load("huatuo-7b")
    one = make_plan(run, Cluster(1, 1, find_gpu("h100")))
    reasons = {row["ds_config"]: row["reason"] for row in one["layouts"]}
    assert "GiB per GPU" in reasons["zero3"]
    eight = make_plan(run, Cluster(1, 8, find_gpu("h100")))
    fitting = [row for row in eight["layouts"] if row["fits"]]
    exact = [row for row in fitting if not row["lossy"]]
    assert (
        eight["best"] == min(exact, key=lambda r: (r["offloads"], r["step_seconds"]))["ds_config"]
    )
    assert {row["ds_config"] for row in fitting if row["lossy"]} == {"zero3_zeropp"}
    assert {"zero3", "zero2", "zero1"} <= {row["ds_config"] for row in fitting}
    for row in fitting:
        for stage in row["stages"]:
            assert stage["gpu_gib"]["peak"] <= 0.92 * 79.1
            seconds = stage["seconds"]
            assert stage["step_seconds"] == pytest.approx(
                seconds["compute"] + seconds["host"] + seconds["exposed"] + seconds["optimizer"]
            )


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("{name: B9, memory_gib: 500, tflops: 2000, hbm: 8000, link: 900}\n")
    gpu = find_gpu(str(mine), network=100)
    assert (gpu.name, gpu.network) == ("B9", 100)
    assert make_plan(load("huatuo-7b"), Cluster(1, 1, gpu))["best"] == "zero1"
    mine.write_text("{name: B9, memory_gib: 500}\n")
    with pytest.raises(ConfigError, match="tflops"):
        find_gpu(str(mine))


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    size = ["--passages", "100000000", "--queries", "1000000", "--tokens", "256"]
    done = run_cli("plan", "huatuo-7b", "--nodes", "4", "--gpus", "8", *size, "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-2])) <= 100
    assert "sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8" in done.stdout
    assert "100,000,000 passages, 1,000,000 queries" in done.stdout
    assert json.loads(out.read_text())["best"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["huatuo-7b", "--nodes", "1", "--gpus", "0"], "'--gpus'"),
        (["huatuo-7b", "--nodes", "1", "--gpus", "8", "--gpu", "h10"], "did you mean 'h100'?"),
        (["huatuo-7b", "--nodes", "1", "--gpus", "3"], "stage1.samples_per_step=256"),
        (["huatuo-7b", "--nodes", "1", "--gpus", "8", "model.backbone=a/b"], "--config FILE"),
        (["huatuo-7b", "--nodes", "1", "--gpus", "8", "model.num_layers=99"], "has 32"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str) -> None:
    done = run_cli("plan", *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
