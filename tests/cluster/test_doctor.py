"""Whatever would end a run later is named before it, with the host and the cure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_ds.cluster import doctor, gpu_check
from lbr_ds.cluster.doctor import NodeTask, check_node, checkpoint_bytes, most_checkpoints
from lbr_ds.cluster.gpu_check import GpuState
from lbr_ds.config import RunConfig, load
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem
from lbr_ds.runs import saved
from lbr_ds.shards import Manifest
from lbr_ds.shards import manifest as manifest_module
from tests.ranks import ROOT, run_cli
from tests.tiny import edit_manifest, tiny_recipe

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with prepared data, never trained."""
    return tiny_recipe(tmp_path_factory.mktemp("made"))


@pytest.fixture
def recipe(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break, on a host that SLURM calls n7."""
    shutil.copytree(made.parent, tmp_path / "copy")
    path = tmp_path / "copy" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(made.parent), str(path.parent)))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    manifest_module._fetched.cache_clear()
    return path


def task(recipe: Path, *overrides: str, stage: int = 1, nodes: int = 1, ranks: int = 2) -> NodeTask:
    return NodeTask(load(recipe, overrides), stage, nodes, ranks)


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1 << 40, 0, free))


def test_a_ready_host_says_what_it_has(recipe: Path) -> None:
    line = check_node(task(recipe))
    assert line.startswith("n7 is ready: 4 shard(s) of gl; 2 checkpoint(s) of 0.5 MiB fit into ")
    assert line.endswith(" host memory; no GPU")
    assert "3 shard(s) of cl" in check_node(task(recipe, stage=2))
    assert not (recipe.parent / "run").exists()  # it only looks


def test_a_checkpoint_is_as_large_as_counted(trained: RunConfig) -> None:
    """The oracle is a saved one: its tensors, without tokenizer and random states."""
    here = NodeTask(trained, 1, 1, 2)
    assert here.shape is not None
    counted = checkpoint_bytes(here.shape, here.layout)
    for checkpoint in saved(trained.run / "stage1"):
        listed = json.loads((checkpoint / "files.json").read_text())
        held = [f["bytes"] for name, f in listed.items() if "optim" in name or "safet" in name]
        # Each file has a header, and of a tiny model that counts.
        assert counted < sum(held) < 1.04 * counted
    assert most_checkpoints(trained, 1) == len(saved(trained.run / "stage1")) == 2
    assert most_checkpoints(trained, 2) == 2


@pytest.mark.parametrize(
    ("overrides", "stage", "count"),
    [
        ([], 1, 4),  # keep 2, the best, the one being written
        ([], 2, 4),
        (["every.evaluate=null"], 2, 3),  # none is the best
        (["stage2.from=last"], 1, 3),
        (["every.keep=5"], 2, 7),
        (["every.keep_every=40"], 1, 4 + 5),  # saved every 20 of 200 steps: every other one stays
        (["every.keep_every=15"], 1, 4 + 3),  # 60, 120, 180
        (["stage1.num_steps=45"], 1, 3),  # never more than are saved
    ],
)
def test_checkpoints_at_once(made: Path, overrides: list[str], stage: int, count: int) -> None:
    long = ["stage1.num_steps=200", "stage2.num_steps=200", "every.save=20"]
    assert most_checkpoints(load(made, [*long, *overrides]), stage) == count


def truncate(data: Path) -> None:
    shard = data / "gl" / "00002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])


def remove_shard(data: Path) -> None:
    (data / "gl" / "00000.tar").unlink()


def shard_is_a_folder(data: Path) -> None:
    """Nobody may be refused a file here who tests as root; of the right size, and not readable."""
    shard = data / "gl" / "00000.tar"
    size = shard.stat().st_size
    shard.unlink()
    shard.mkdir()
    now = shard.stat().st_size
    edit_manifest(data, lambda raw: raw["splits"]["gl"]["shards"][0].update(bytes=now))
    assert size != now


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (shutil.rmtree, r"^n7: .*/data holds no manifest.json; run `lbr-ds prepare`"),
        (truncate, r"^n7: .*gl/00002.tar: truncated: \d+ bytes, but the manifest lists \d+; copy"),
        (remove_shard, r"^n7: .*gl/00000.tar: the manifest names this shard and it is missing"),
        (shard_is_a_folder, r"^n7: .*gl/00000.tar: cannot be read \(Is a directory\); check its"),
    ],
)
def test_faults_of_the_data(recipe: Path, fault: Callable[[Path], Any], words: str) -> None:
    fault(recipe.parent / "data")
    with pytest.raises(DataError, match=words):
        check_node(task(recipe))


def test_what_skip_passes_over_is_no_fault(recipe: Path) -> None:
    truncate(recipe.parent / "data")
    assert "is ready" in check_node(task(recipe, "data.on_error=skip"))


@pytest.mark.slow
def test_data_behind_a_url(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard is fetched, and the others must have room."""
    data = recipe.parent / "data"
    shards = Manifest.load(data).shards("gl")
    here = task(recipe, f"data.folder=file://{data}")
    assert "4 shard(s) of gl" in doctor.check_data(here)
    cached = recipe.parents[1] / "cache" / "shards"
    assert [path.stem for path in cached.glob("*.tar")] == [shards[0].sha256]
    need = sum(shard.bytes for shard in shards[1:])
    disk(monkeypatch, need)
    doctor.check_data(here)
    disk(monkeypatch, need - 1)
    with pytest.raises(EnvironmentProblem, match=r"cache/shards: .* to be fetched; name a"):
        doctor.check_data(here)
    all_but_one = (need - 1) / 2**30  # the cache takes no more than that, and holds one already
    doctor.check_data(task(recipe, f"data.folder=file://{data}", f"data.cache_gib={all_but_one}"))
    monkeypatch.undo()
    (data / "gl" / "00000.tar").write_bytes(b"x" * shards[0].bytes)
    shutil.rmtree(cached)
    monkeypatch.setenv("LBR_DS_CACHE", str(recipe.parents[1] / "cache"))
    with pytest.raises(DataError, match=r"gl/00000\.tar: altered"):
        doctor.check_data(here)


def test_the_run_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match=r"^n7: run=/proc/x/run: /proc cannot be written"):
        check_node(task(recipe, "run=/proc/x/run"))
    here = task(recipe)
    assert here.shape is not None
    need = 2 * checkpoint_bytes(here.shape, here.layout)
    disk(monkeypatch, need)
    doctor.check_run_folder(here)
    disk(monkeypatch, need - 1)
    with pytest.raises(EnvironmentProblem, match=r"needed for up to 2 checkpoints of 0\.5 MiB"):
        doctor.check_run_folder(here)
    there = recipe.parent / "run/stage1/checkpoints/step-000003"
    there.mkdir(parents=True)
    (there / "x").write_bytes(b"x")
    doctor.check_run_folder(here)  # what lies there has its room already


def test_host_memory(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < doctor.free_host_memory() <= total
    here = task(recipe)
    assert here.shape is not None
    numbers = here.shape.total
    # CPU ranks under ZeRO-3: parameters, gradients, optimizer and bucket of each, and at a save the
    # weights once more and a copy of the optimizer.
    bucket = 2 * 4 * here.layout.reduce_bucket
    least = 4 * numbers + 12 * numbers + 20 * numbers + bucket
    monkeypatch.setattr(doctor, "free_host_memory", lambda: round(0.9 * least))
    with pytest.raises(EnvironmentProblem, match=r"needed at least \(weights at a save"):
        doctor.check_host_memory(here)
    monkeypatch.setattr(doctor, "free_host_memory", lambda: round(1.1 * least))
    doctor.check_host_memory(here)
    with pytest.raises(ConfigError, match="is not a multiple of 3 ranks"):
        doctor.check_host_memory(task(recipe, ranks=3))


def test_a_backbone_that_is_not_known_is_not_checked(recipe: Path) -> None:
    config = recipe.parent / "backbone" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "other"}))
    line = check_node(task(recipe))
    assert "free in " in line
    assert line.count("not checked") == 2


SOUND = [GpuState("H100", 0, "", 0.0010), GpuState("H100", 0, "", 0.0012)]


@pytest.mark.parametrize(
    ("found", "promised", "ranks", "words"),
    [
        (SOUND, 3, 2, r"SLURM allocated 3 GPU\(s\), 2 can be used here"),
        (SOUND, 2, 3, r"3 ranks for 2 GPU\(s\), .* --ntasks-per-node=2"),
        (
            [*SOUND, GpuState("H100", 3 << 30)],
            0,
            1,
            r"GPU 2 \(H100\): 3.0 GiB of its memory are",
        ),
        ([GpuState("H100", fault="fails (x)"), *SOUND], 0, 1, r"GPU 0 \(H100\): fails \(x\)"),
        (
            [*SOUND, GpuState("H100", 0, "", 0.0014)],
            0,
            1,
            r"GPU 2 \(H100\): .* 1.40 ms, 1.00 ms on",
        ),
        (
            [GpuState("CPU", fault="a matrix product is not finite")],
            0,
            1,
            "the processor: a matrix product is not",
        ),
    ],
)
def test_faults_of_gpus(found: list[GpuState], promised: int, ranks: int, words: str) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"^{words}.*; or leave .* --exclude=n7$"):
        gpu_check.check(found, promised=promised, ranks=ranks, host="n7")


def test_sound_gpus() -> None:
    assert gpu_check.check(SOUND, promised=2, ranks=2, host="n7") == "2 x H100"
    other = GpuState("A100", 0, "", 0.0030)  # of another kind: slower, and not ill
    assert gpu_check.check([*SOUND, other], promised=2, ranks=1, host="n7") == "3 x H100"
    assert gpu_check.check(gpu_check.probe(), promised=0, ranks=4, host="n7") == "no GPU"


def test_wrong_products_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, right, calls = torch.device("cpu"), torch.Tensor.__matmul__, []

    def wrong_once(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        result = right(a, b)
        result[3, 5] += 0.01 * (len(calls) == 21)  # the last of the second round
        return result

    assert gpu_check.product(cpu)[0] == ""
    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong_once)
    assert "gives different results" in gpu_check.product(cpu)[0]
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: right(a, b) / 0)
    assert "not finite" in gpu_check.product(cpu)[0]


@pytest.mark.slow
def test_by_the_command_line(recipe: Path) -> None:
    words = ["doctor", str(recipe), "--stage", "1", "--nodes", "2", "--nproc", "2"]
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("n7 is ready: ")
    truncate(recipe.parent / "data")
    done = run_cli(*words, "run=/proc/x", SLURM_GPUS_ON_NODE="2")
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("lbr-ds: error: n7: ")
    for word in ("truncated", "run=/proc/x", "SLURM allocated 2 GPU(s), 0 can be used here"):
        assert word in line


def test_what_hangs_is_named(recipe: Path) -> None:
    """A pipe that nobody writes into stands for a mount whose server is gone."""
    manifest = recipe.parent / "data" / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    program = (
        "import sys; from lbr_ds.cluster import doctor; from lbr_ds.config import load;"
        "doctor.TIMEOUT_SECONDS = 1;"
        "doctor.check_node(doctor.NodeTask(load(sys.argv[1]), 1, 1, 1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 6, done.stderr
    assert done.stderr.endswith(
        "lbr-ds: error: n7: the check of data.folder did not end within 1 s; "
        "leave the node out with sbatch --exclude=n7\n"
    )
