"""By the command line: what is wrong gets one line that names the place, and the exit code says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbr_ds.cli import app
from lbr_ds.config import RunConfig
from tests.ranks import run_cli
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe with prepared data, never trained."""
    return tiny_recipe(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def broken(recipe: Path, tmp_path: Path) -> Path:
    """A copy of it to break: recipe.yaml, corpus.jsonl, data/, backbone/."""
    shutil.copytree(recipe.parent, tmp_path / "copy")
    path = tmp_path / "copy" / "recipe.yaml"
    path.write_text(path.read_text().replace(str(recipe.parent), str(path.parent)))
    return path


def truncate_shard(folder: Path) -> None:
    shard = folder / "data" / "gl" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])


def remove_shard(folder: Path) -> None:
    (folder / "data" / "gl" / "00001.tar").unlink()


def remove_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")


def spoil_record(folder: Path) -> None:
    """Same length, so that only its checksum shows it."""
    shard = folder / "data" / "gl" / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"query"', b'"qqqqq"'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (truncate_shard, ["gl/00000.tar", "truncated", "manifest"]),
        (remove_shard, ["gl/00001.tar", "missing"]),
        (remove_data, ["data", "manifest.json", "lbr-ds prepare"]),
        (spoil_record, ["gl/00000.tar", "record", "byte", "altered"]),
    ],
)
def test_faults_of_the_data_stop_training(
    broken: Path, fault: Callable[[Path], None], words: list[str]
) -> None:
    fault(broken.parent)
    done = run_cli("train", str(broken), "--stage", "1", "--nproc", "1", "data.workers=1")
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("lbr-ds: error:")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["corpus.jsonl:2", "JSON"]),
        ('{"id": "x", "query": "", "positives": ["a"]}', ["corpus.jsonl:2", "query is missing"]),
        ('{"id": "x", "query": "q", "positives": []}', ["corpus.jsonl:2", "positives is empty"]),
        ('{"id": "x", "query": "q", "positive": "a"}', ["corpus.jsonl:2", "'positive'"]),
        ('{"id": "r0", "query": "q", "positives": ["a"]}', ["r0", "corpus.jsonl"]),
    ],
)
def test_bad_records_are_named(broken: Path, line: str, words: list[str]) -> None:
    corpus = broken.parent / "corpus.jsonl"
    first, *rest = corpus.read_text().splitlines()
    corpus.write_text("\n".join([first, line, *rest]) + "\n")
    before = (broken.parent / "data" / "manifest.json").read_bytes()
    done = run_cli("prepare", str(broken))
    assert done.returncode == 3
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert (broken.parent / "data" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare", "nowhere.yaml"], 2, "no file 'nowhere.yaml'"),
        (["prepare", "{recipe}", "data.foldr=x"], 2, "did you mean 'folder'?"),
        (
            ["train", "{recipe}", "--stage", "3"],
            2,
            "'--stage': Input should be less than or equal to 2",
        ),
        (["train", "{recipe}", "--stage", "2", "--nproc", "1"], 4, "train RECIPE --stage 1"),
        (["train", "{recipe}", "--stage", "1", "--nproc", "3"], 2, "samples_per_step"),
        (["train", "{recipe}", "--stage", "1", "engine.ds_config=zero9"], 2, "zero3_cpu"),
        (["export", "nowhere", "out"], 4, "no such folder"),
        (["eval", "./nowhere", "--data", "x"], 2, "nowhere: no such folder"),
        (["report", "nowhere"], 2, "nowhere"),
    ],
)
def test_bad_commands(recipe: Path, arguments: list[str], code: int, words: str) -> None:
    done = run_cli(*(a.format(recipe=recipe) for a in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_non_finite_loss_stops_and_keeps_the_checkpoint(trained: RunConfig, tmp_path: Path) -> None:
    """Decay that turns and enlarges the weights at every step, until they leave fp32's range."""
    recipe = tiny_recipe(
        tmp_path,
        stage1__optim__lr=10,
        stage1__optim__weight_decay=10,
        every__save=1,
        stage1__num_steps=30,
        stage1__optim__min_lr_ratio=1,
        stage1__optim__warmup_ratio=0,
    )
    done = run_cli("train", str(recipe), "--stage", "1", "--nproc", "2")
    assert done.returncode == 5, done.stderr
    assert "gradient norm" in done.stderr
    assert "last checkpoint is kept" in done.stderr
    states = sorted((tmp_path / "run" / "stage1" / "checkpoints").glob("step-*/state.json"))
    assert states
    assert json.loads(states[-1].read_text())["step"] >= 1


def test_init_copies_what_a_project_needs(tmp_path: Path) -> None:
    done = run_cli("init", str(tmp_path / "new"))
    assert done.returncode == 0
    for name in ("recipes/demo.yaml", "ds_configs/zero3.json", "slurm/stage1.sbatch"):
        assert (tmp_path / "new" / name).is_file()
    (tmp_path / "new" / "slurm" / "stage1.sbatch").write_text("edited")
    again = run_cli("init", str(tmp_path / "new"))
    assert again.returncode == 2
    assert "slurm exists already" in again.stderr


def verbs() -> list[str]:
    """All verbs that the program has, as they are typed."""
    found = [str(info.name) for info in app.registered_commands]
    for group in app.registered_groups:
        inner = group.typer_instance.registered_commands if group.typer_instance else []
        found += [f"{group.name} {i.name or getattr(i.callback, '__name__', '')}" for i in inner]
    return found


@pytest.mark.parametrize("verb", verbs())
def test_help_is_one_line_and_has_an_example(verb: str) -> None:
    done = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert done.exit_code == 0
    assert f"Example: lbr-ds {verb}" in " ".join(done.output.split())


def test_wrong_input_is_found_before_heavy_libraries_are_imported(tmp_path: Path) -> None:
    """Torch, DeepSpeed and transformers take seconds to import, from a cold disk many of them."""
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    train = f"train {recipe} --stage"
    wrong = {
        "train nowhere.yaml --stage 1": 2,
        f"{train} 1 seed=x": 2,
        f"{train} 1 data.folder=/nowhere": 3,
        f"{train} 1 data.folder={tmp_path}/empty": 3,
        f"{train} 1 engine.ds_config=zero9": 2,
        f"{train} 1 run={tmp_path}/file": 6,
        f"{train} 1 --nproc 3": 2,
        f"{train} 2": 4,
        f"{train} 2 stage2.from=7": 4,
        f"{train} 2 stage2.from=/nowhere": 2,
        f"export /nowhere {tmp_path}/out": 4,
        f"export {tmp_path}/empty {tmp_path}/out": 4,
        f"eval /nowhere --data {tmp_path}/data": 2,
        f"eval {tmp_path}/empty --data {tmp_path}/data": 2,
        "eval bm25 --data /nowhere": 3,
        f"mine {recipe} data.folder=/nowhere": 3,
        "mine nowhere.yaml": 2,
    }
    script = (
        "import sys; from lbr_ds.cli import run\n"
        "codes = [run(line.split()) for line in sys.argv[1:]]\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'mteb', 'numpy'} & set(sys.modules)\n"
        "print(codes, sorted(heavy))"
    )
    command = [sys.executable, "-c", script, *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == f"{list(wrong.values())} []", done.stderr
