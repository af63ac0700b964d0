"""The README holds: its commands for one's own domain are run, the rest checked by name."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lbr_ds.config import RunConfig
from tests.ranks import ROOT, run_cli

README = (ROOT / "README.md").read_text()
RECIPE = "recipes/medical-1.5b.yaml"


def blocks() -> list[str]:
    """The code blocks of README.md, whatever their language."""
    return re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def own_domain() -> list[str]:
    """The block of commands from prepare to report."""
    (block,) = [b for b in blocks() if b.startswith("lbr-ds prepare")]
    return block.strip().splitlines()


def test_own_domain_commands_run(trained: RunConfig, tmp_path: Path) -> None:
    """As written, with a tiny recipe for the 1.5B one and two ranks for eight."""
    names = {
        RECIPE: str(trained.run / "recipe.yaml"),
        "runs/medical-1.5b": str(trained.run),
        "data/medical": str(trained.data.folder),
        "models/medical": str(tmp_path / "model"),
        "8": "2",
    }
    for line in own_domain():
        program, *words = shlex.split(line)
        assert program == "lbr-ds"
        done = run_cli(*(names.get(word, word) for word in words))
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (trained.run / "report.html").is_file()
    assert "Recall@10" in (tmp_path / "model" / "README.md").read_text()


def test_exported_folder_scores_as_the_run_does(trained: RunConfig, tmp_path: Path) -> None:
    """Our encoder on the checkpoint and plain sentence-transformers on the export, through MTEB."""
    scores = {}
    assert run_cli("export", str(trained.run), str(tmp_path / "model")).returncode == 0
    for model in (trained.run, tmp_path / "model"):
        out = tmp_path / f"{model.name}.json"
        done = run_cli("eval", str(model), "--data", str(trained.data.folder), "--out", str(out))
        assert done.returncode == 0, done.stderr
        scores[model] = json.loads(out.read_text())
    ours, stock = scores.values()
    assert ours["tasks"] == stock["tasks"]
    assert ours["per_query"] == stock["per_query"]


def test_named_files_exist() -> None:
    for path in re.findall(
        r"`((?:lbr_ds|train|batching|model|objectives|shards)/\S+\.py)`", README
    ):
        assert (ROOT / "lbr_ds" / path).is_file(), path
    for path in re.findall(r"\]\((\S+?)\)", README):
        assert (ROOT / path).is_file(), path


def test_rooms_of_the_map_are_the_rooms_there_are() -> None:
    told = set(re.findall(r"`(\w+(?:/|\.py))`", README[README.index("## How it is built") :]))
    there = {p.name + "/" if p.is_dir() else p.name for p in (ROOT / "lbr_ds").iterdir()}
    there -= {
        "__init__.py",
        "__main__.py",
        "__pycache__/",
        "py.typed",
        "resources.py",
        "environment.py",
        "templates/",
    }
    assert there <= told


@pytest.mark.parametrize("name", ["demo", "test"])
def test_set_up_commands_install_an_extra_that_exists(name: str) -> None:
    assert f"pip install -e '.[{name}]'" in README
    assert re.search(rf"^{name} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_ci_calls_the_readmes_test_command() -> None:
    (command,) = [b for b in blocks() if "pytest" in b]
    assert command.strip().endswith("&& bash .ci/install-slurm && pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "bash .ci/install-slurm" in ci
    assert re.search(r"^pytest$", ci, re.MULTILINE)
    for suite in ("kills", "suites", "stacks"):
        assert f"pytest -m {suite}" in README or f"pytest -n 0 -m {suite}" in README
