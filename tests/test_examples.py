"""The scripts of lbr_ds/examples/ run as they are, on small data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_ds.config import RunConfig
from lbr_ds.runs import checkpoints
from tests.ranks import ROOT, TIMEOUT_SECONDS, free_port
from tests.tiny import backbone, tiny_recipe

EXAMPLES = ROOT / "lbr_ds" / "examples"


def run_example(name: str, *arguments: str, text: str = "") -> str:
    """Run a script and return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        input=text,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_tested(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    assert f'"{path.name}"' in Path(__file__).read_text()


def test_corpus_reader(tmp_path: Path) -> None:
    lines = [f"term {n}: meaning number {n} of many, {n * n} words long" for n in range(80)]
    file = tmp_path / "terms.txt"
    file.write_text("\n".join(lines))
    printed = run_example("corpus_reader.py", str(file), str(tmp_path / "data"))
    counts = {line.split(":")[0]: int(line.split()[1]) for line in printed.splitlines()}
    assert set(counts) == {"gl", "cl", "eval"}
    assert sum(counts.values()) == len(lines)
    file.write_text("\n".join([*lines, "no colon here"]))
    broken = subprocess.run(
        [sys.executable, str(EXAMPLES / "corpus_reader.py"), str(file), str(tmp_path / "more")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert broken.returncode != 0
    assert "terms.txt:81: expected TERM: DEFINITION" in broken.stderr


@pytest.mark.slow
def test_train_from_python(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    printed = run_example("train_from_python.py", str(recipe), "stage1.num_steps=2")
    run = tmp_path / "run"
    assert f"stage 2: {checkpoints(run / 'stage2')[-1]}" in printed
    assert "R@10" in printed
    assert (run / "export" / "parity.json").is_file()


def test_search(trained: RunConfig) -> None:
    """A document is its own nearest one."""
    documents = ["the heart pumps blood", "a bone is broken", "the skin has a rash"]
    printed = run_example("search.py", str(trained.run), *documents, text="\n".join(documents))
    lines = printed.splitlines()
    for number, document in enumerate(documents):
        assert lines[4 * number] == document
        assert lines[4 * number + 1].split(maxsplit=1) == ["1.000", document]


def losses(printed: str) -> list[float]:
    return [float(line.rsplit(maxsplit=1)[1]) for line in printed.splitlines()]


@pytest.mark.slow
def test_bottleneck_attention(tmp_path: Path) -> None:
    """With random weights, and with a model and a tokenizer from a folder."""
    for arguments in ([], [str(backbone(tmp_path / "backbone"))]):
        steps = losses(run_example("bottleneck_attention.py", *arguments))
        assert len(steps) == 30
        assert steps[-1] < steps[0]


@pytest.mark.slow
def test_info_nce_over_ranks() -> None:
    """Two ranks print the losses of one, and the losses fall."""
    script = str(EXAMPLES / "info_nce_over_ranks.py")
    printed = []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [sys.executable, *launcher, f"--master-port={free_port()}", script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        printed.append(losses(done.stdout))
    alone, together = printed
    assert together == pytest.approx(alone, abs=2e-6)
    assert sum(alone[-5:]) < sum(alone[:5])
