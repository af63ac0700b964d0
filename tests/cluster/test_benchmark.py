"""`lbr-ds bench cluster`: rows of real ranks, resumed and failed ones, and what follows from them.

Never how fast this machine is.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_ds.batching import Sequence, pack
from lbr_ds.cluster.benchmark import Sweep, run_sweep
from lbr_ds.cluster.benchmark.derive import derive
from lbr_ds.cluster.benchmark.processes import failure_reason
from lbr_ds.cluster.benchmark.rank import random_work, work_flops
from lbr_ds.cluster.benchmark.sweep import configurations
from lbr_ds.cluster.benchmark.traffic import merge_spans, total_length
from lbr_ds.config import load
from lbr_ds.distributed import World
from lbr_ds.errors import ConfigError
from lbr_ds.plan.flops import bottleneck_pairs, flops
from lbr_ds.plan.gpus import gpu_of_device
from lbr_ds.plan.shape import find_shape, shape_of
from lbr_ds.plan.work import work_of
from lbr_ds.training.stages import STAGES
from lbr_ds.training.work import Work
from tests.ranks import ROOT, run_cli
from tests.tiny import backbone, tiny_recipe

pytestmark = pytest.mark.slow

GPU = "{name: made-up, memory_gib: 8, tflops: 0.5, hbm: 20, link: 5}"
NETWORK = "network-2-ranks"
ONE, TWO = "1-ranks-256-tokens-{}-4-samples", "2-ranks-256-tokens-{}-8-samples"
NAMES = [
    ONE.format("zero3_cpu"),
    ONE.format("zero9"),
    NETWORK,
    TWO.format("zero3_cpu"),
    TWO.format("zero9"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def words(recipe: Path) -> list[str]:
    """A sweep of five rows, two of which cannot be."""
    gpu = recipe.with_name("gpu.yaml")
    gpu.write_text(GPU)
    return [
        "bench",
        "cluster",
        str(recipe),
        "--ranks",
        "1,2",
        "--ds-configs",
        "zero3_cpu,zero9",
        "--scaling",
        "weak",
        "--steps",
        "2",
        "--gpu",
        str(gpu),
        "--out",
        str(recipe.with_name("out")),
    ]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "result.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


@pytest.fixture(scope="module")
def swept(words: list[str]) -> tuple[list[dict[str, Any]], Path, str]:
    """(rows written when all processes were killed, folder, what the same command printed)."""
    folder = Path(words[-1])
    first = subprocess.Popen(
        [sys.executable, "-m", "lbr_ds", *words],
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 900
    try:
        while len(rows_of(folder)) < 3:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = rows_of(folder)
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    return before, folder, done.stdout


def test_killed_it_resumes_at_the_first_missing_row(swept: Any) -> None:
    before, folder, _ = swept
    assert [row["measure"] for row in before] == NAMES[: len(before)]
    assert 3 <= len(before) < 5
    after = rows_of(folder)
    assert [row["measure"] for row in after] == NAMES
    for was, now in zip(before, after, strict=False):
        assert was["figures"] == now["figures"]


def test_rows_are_complete(swept: Any) -> None:
    _, folder, _ = swept
    rows = {row["measure"]: row for row in rows_of(folder)}
    result = json.loads((folder / "result.json").read_text())
    assert list(result)[:4] == ["suite", "environment", "settings", "rows"]
    for ranks, name in ((1, ONE), (2, TWO)):
        row = rows[name.format("zero3_cpu")]
        found = row["figures"]
        assert row["reason"] is None
        assert row["value"] == found["tokens_per_second_per_rank"] > 0
        assert (found["data"], found["device"], found["steps"]) == ("real", "CPU", 2)
        assert len(found["hosts"]) == 1
        assert found["memory_gib"] > 0
        assert found["tokens_per_step"] <= 256 * ranks * found["micro_batches_per_rank"]
        spent = found["tokens_per_step"] / found["step_seconds"] / ranks
        assert math.isclose(found["tokens_per_second_per_rank"], spent)
        assert 0 <= found["exposed_share"] <= found["collective_share"] + 1e-9 <= 1
        assert 0 <= found["data_wait_share"] < 1
        assert 0 < found["straggler"] <= 1
        assert row["mfu"] == found["flops_per_second_per_rank"] / 0.5e12
        assert row["planned"]["tokens_per_second_per_rank"] > 0
    two = rows[TWO.format("zero3_cpu")]
    assert two["weak"] == two["value"] / rows[ONE.format("zero3_cpu")]["value"]
    assert two["figures"]["collective_share"] > 0


def test_collectives_are_measured_in_several_sizes(swept: Any) -> None:
    (row,) = [r for r in rows_of(swept[1]) if r["kind"] == "network"]
    found = row["figures"]["collectives"]
    names = [(f["collective"], f["bytes"] >> 20) for f in found]
    assert names == [(n, s) for s in (1, 4, 16) for n in ("all_gather", "reduce_scatter")]
    for f in found:
        assert math.isclose(f["gb_per_second"], f["bytes"] / 2 / f["seconds"] / 1e9)
    assert row["value"] == found[-2]["gb_per_second"]


def test_a_failed_configuration_is_a_row_with_its_reason(swept: Any) -> None:
    failed = {r["measure"]: r["reason"] for r in rows_of(swept[1]) if r["reason"]}
    assert list(failed) == [ONE.format("zero9"), TWO.format("zero9")]
    for reason in failed.values():
        assert reason.startswith("no file 'zero9'; give a path, or one of the shipped ds_configs")


def test_table_and_plot(swept: Any) -> None:
    _, folder, printed = swept
    text = (folder / "RESULT.md").read_text()
    assert text in printed
    lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert [line[:4] for line in lines[2:6]] == [
        ["1", "256", "zero3_cpu", "4"],
        ["1", "256", "zero9", "4"],
        ["2", "256", "zero3_cpu", "8"],
        ["2", "256", "zero9", "8"],
    ]
    assert lines[3][4] == "failed"
    assert lines[2][11] == "1.00"
    assert "strict count" in text
    assert (folder / "result.png").read_bytes()[:4] == b"\x89PNG"


def test_other_settings_are_not_mixed_in(swept: Any, words: list[str]) -> None:
    done = run_cli(*words, "model.max_length=24")
    assert done.returncode == 2
    assert "holds rows of other settings (model.max_length: 32, now 24)" in done.stderr


def test_random_texts_where_no_data_is_prepared(tmp_path: Path) -> None:
    """Stage 2 on two ranks; a step is two chunks of gradient caching on each."""
    recipe = tiny_recipe(tmp_path / "tiny", prepared=False)
    done = run_cli(
        "bench",
        "cluster",
        str(recipe),
        "stage2.num_negatives=0",
        "--stage",
        "2",
        "--ranks",
        "2",
        "--tokens",
        "128",
        "--scaling",
        "strong",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    (row,) = [r for r in rows_of(tmp_path / "out") if r["kind"] == "training"]
    assert row["reason"] is None, row["reason"]
    assert row["figures"]["data"] == "random"
    assert row["figures"]["tokens_per_step"] == 8 * 2 * 32
    assert row["figures"]["micro_batches_per_rank"] == 2


def test_a_backbone_whose_flops_are_not_counted(tmp_path: Path) -> None:
    """GPT-2's config.json names its sizes otherwise; all other figures of the row are measured."""
    recipe = tiny_recipe(tmp_path / "tiny")
    raw = backbone(tmp_path / "gpt2", "gpt2", tie_word_embeddings=True)
    gpu = tmp_path / "gpu.yaml"
    gpu.write_text(GPU)
    command = ["bench", "cluster", str(recipe), f"model.backbone={raw}", "--ranks", "1"]
    command += ["--tokens", "256", "--steps", "2", "--gpu", str(gpu)]
    done = run_cli(*command, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "out")
    assert row["reason"] is None, row["reason"]
    assert row["figures"]["flops_per_second_per_rank"] is None
    assert row["mfu"] is None
    assert row["value"] == row["figures"]["tokens_per_second_per_rank"] > 0


# --- without ranks -----------------------------------------------------------------------------

FAKE = """\
import json, os, pathlib, sys
row = pathlib.Path(sys.argv[sys.argv.index("--row") + 1])
(row.parent / (row.stem + ".words")).write_text(json.dumps(sys.argv[1:]))
if "16" in sys.argv[1:3]:
    print("ended with exit code 1")
    said = "Traceback\\ntorch.OutOfMemoryError: CUDA out of memory."
    pathlib.Path(sys.argv[3] + ".rank-1.log").write_text(said)
    sys.exit(1)
found = {"device": "made-up", "hosts": ["a"], "collectives": [{"collective": c, "bytes": 1 << 20,
         "seconds": 1, "gb_per_second": 1} for c in ("all_gather", "reduce_scatter")]}
if "--network" not in sys.argv:
    found = {"device": "made-up", "hosts": ["a"], "data": "real", "exposed_share": 0.1,
             "collective_share": 0.2, "data_wait_share": 0.0, "tokens_per_second_per_rank": 7.0,
             "flops_per_second_per_rank": 1.0, "step_seconds": 1, "memory_gib": 1, "straggler": 1}
row.write_text(json.dumps(found))
"""


def test_launcher_gets_nodes_and_the_configurations_keys(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    sweep = Sweep(
        str(recipe),
        1,
        (2, 16),
        tmp_path / "out",
        overrides=("seed=1",),
        layouts=("zero2",),
        scaling=("strong",),
        per_node=8,
        launcher=f"{sys.executable} {tmp_path}/fake.py {{nodes}} {{ranks}} {{log}}",
    )
    result = run_sweep(sweep)
    rows = {row["measure"]: row for row in result["rows"]}
    assert [row["reason"] is None for row in rows.values()] == [True, True, False, False]
    failed = rows["16-ranks-256-tokens-zero2-8-samples"]
    assert failed["reason"].startswith("out of memory: torch.OutOfMemoryError: CUDA out of memory")
    assert (failed["nodes"], failed["per_node"]) == (2, 8)
    told = json.loads((tmp_path / "out/rows/2-ranks-256-tokens-zero2-8-samples.words").read_text())
    assert told[:2] == ["1", "2"]
    assert told[3:6] == ["bench", "cluster", str(recipe)]
    keys = [
        "seed=1",
        "stage2.from=backbone",
        "stage1.samples_per_step=8",
        "stage1.micro_batch_tokens=256",
        "engine.ds_config=zero2",
    ]
    assert told[6:11] == keys
    written = len(result["rows"])
    assert [r["measure"] for r in run_sweep(sweep)["rows"]] == list(rows)
    assert len(run_sweep(sweep, retry=True)["rows"]) == written


def test_ranks_that_do_not_fill_their_nodes_are_refused(recipe: Path, tmp_path: Path) -> None:
    sweep = Sweep(str(recipe), 1, (12,), tmp_path, launcher="srun", per_node=8)
    with pytest.raises(ConfigError, match="--ranks 12 does not fill nodes of --per-node 8"):
        run_sweep(sweep)


def test_an_unknown_gpu_is_refused_before_anything_runs(recipe: Path, tmp_path: Path) -> None:
    sweep = Sweep(str(recipe), 1, (1,), tmp_path, gpu="h10")
    with pytest.raises(ConfigError, match=r"--gpu h10: no such GPU .*; did you mean"):
        run_sweep(sweep)
    assert not list(tmp_path.iterdir())


def test_weak_and_strong_scaling_end_in_the_recipes_step(recipe: Path) -> None:
    run = load(recipe)
    sweep = Sweep(str(recipe), 1, (4, 1, 2), Path("x"), tokens=(64, 128))
    found = [
        (c.ranks, c.tokens, c.samples) for c in configurations(sweep, run) if c.kind == "training"
    ]
    assert found == [
        (1, 64, 2),
        (1, 64, 8),
        (1, 128, 2),
        (1, 128, 8),
        (2, 64, 4),
        (2, 64, 8),
        (2, 128, 4),
        (2, 128, 8),
        (4, 64, 8),
        (4, 128, 8),
    ]


def made_up(ranks: int, samples: int, value: float | None) -> dict[str, Any]:
    return {
        "kind": "training",
        "ranks": ranks,
        "samples": samples,
        "micro_batch_tokens": 64,
        "ds_config": "zero3",
        "value": value,
        "figures": None,
        "nodes": 1,
        "per_node": ranks,
    }


def test_efficiency_is_over_the_fewest_ranks_with_the_same_share(recipe: Path) -> None:
    rows = [
        made_up(1, 2, 100.0),
        made_up(1, 8, 120.0),
        made_up(2, 4, 90.0),
        made_up(2, 8, None),
        made_up(4, 8, 60.0),
    ]
    result = derive({"rows": rows}, Sweep(str(recipe), 1, (1, 2, 4), Path("x")), load(recipe))
    assert [row["weak"] for row in result["rows"]] == [1.0, None, 0.9, None, 0.6]
    assert [row["strong"] for row in result["rows"]] == [None, 1.0, None, None, 0.5]


@pytest.mark.parametrize("lora", [[], ["lora.rank=3"]], ids=["whole", "adapters"])
@pytest.mark.parametrize("number", [1, 2])
def test_strict_count_of_random_work_is_the_plans(
    recipe: Path, number: int, lora: list[str]
) -> None:
    run = load(recipe, ["stage1.micro_batch_tokens=160", "stage2.micro_batch_tokens=160", *lora])
    shape = shape_of(run)
    work = random_work(run, STAGES[number], World(), shape.vocab)
    told = work_of(run, number, 1)
    assert work_flops(run, work, shape, shape.adapter_parameters) == told.useful_flops(shape)
    assert work.num_tokens == told.tokens
    assert len(work.micro_batches) == told.micro_batches


def test_strict_count_of_unequal_texts(recipe: Path) -> None:
    run = load(recipe)
    shape = find_shape(run.model, run.bottleneck.count)
    sizes = [(3, 5), (9, 1), (4, 4)]
    batch = pack([Sequence([1] * (x + 2), 2, [1] * y) for x, y in sizes])
    work = Work(0, 3, 0, [batch], [torch.arange(3)], [])
    pairs = sum(bottleneck_pairs(x, 2, y) for x, y in sizes)
    tokens = sum(x + 2 + y for x, y in sizes)
    assert work_flops(run, work, shape) == flops(shape, tokens=tokens, pairs=pairs, scored=10)


def test_spans_of_time_are_joined() -> None:
    spans = merge_spans([(5, 7), (0, 2), (1, 3), (3, 4), (6, 6)])
    assert spans == [(0, 4), (5, 7)]
    assert total_length(spans) == 6


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100-80 SXM"),
        ("NVIDIA H200", "H200-141 SXM"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", "H100-80 PCIe"),
        ("NVIDIA H100 NVL", "H100-94 NVL"),
        ("NVIDIA A100 80GB PCIe", "A100-80 PCIe"),
        ("NVIDIA GH200 480GB", "GH200-96"),
        ("NVIDIA B200", "B200-180 SXM"),
        ("NVIDIA H200 NVL", None),
        ("CPU", None),
    ],
)
def test_gpu_by_its_drivers_name(device: str, name: str | None) -> None:
    found = gpu_of_device(device)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("printed", "code", "reason"),
    [
        (
            "x\nlbr-ds: error: rank 1 was killed by SIGKILL\n",
            86,
            "rank 1 was killed by SIGKILL (exit code 86)",
        ),
        (
            "lbr-ds: error: another rank ended unexpectedly; see the error of that rank "
            "(for training, RUN/stageN/log/rank-N.log)\nValueError: odd\n",
            1,
            "ValueError: odd (exit code 1)",
        ),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0\nsrun: error",
            137,
            "out of memory: slurmstepd: error: Detected 1 oom_kill event in StepId=1.0",
        ),
        ("", -9, "nothing was printed (exit code -9)"),
    ],
)
def test_why_a_configuration_failed(printed: str, code: int, reason: str) -> None:
    assert failure_reason(printed, code) == reason
