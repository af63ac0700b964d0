"""The documentation holds: the README's commands are run, and what all READMEs name exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from lbr_ds import __version__
from lbr_ds.cli import app
from lbr_ds.config import RunConfig, load
from tests.ranks import ROOT, run_cli

README = (ROOT / "README.md").read_text()
RECIPE = "recipes/medical-1.5b.yaml"
DOCUMENTS = sorted(
    path
    for place in (".", "lbr_ds", "slurm", "ds_configs", "tests")
    for path in (ROOT / place).glob("*.md" if place == "." else "**/*.md")
    if path.name != "CHANGELOG.md"
)
documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def blocks(text: str = README) -> list[str]:
    """The code blocks of a document, whatever their language."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


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


def test_the_data_section_is_a_recipe_and_its_python_runs(tmp_path: Path) -> None:
    """The YAML example loads as a recipe's data, and the API example calls what there is."""
    (block,) = [b for b in blocks() if b.startswith("data:\n")]
    recipe = tmp_path / "recipe.yaml"
    rest = (ROOT / "lbr_ds" / "recipes" / "demo.yaml").read_text()
    others = re.sub(r"^data:\n(  .*\n|\n)*", "", rest, flags=re.MULTILINE)
    recipe.write_text(f"{others}\n{block}  folder: data/x\n")
    assert load(recipe).data.sources[0].shape == "choices"
    (code,) = [b for b in blocks() if "lbr_ds.load_recipe" in b]
    (name,) = re.findall(r"Encoder\((.*?)\)", code)
    lines = [line for line in code.splitlines() if line.startswith(("import", "recipe"))]
    values: dict[str, Any] = {}
    exec("\n".join(lines), values)
    assert str(values["recipe"].run) == json.loads(name)


@documents
def test_named_files_exist(document: Path) -> None:
    text = document.read_text()
    for path in re.findall(r"\]\(([^)#\s]+)(?:#\S*)?\)", text):
        if not path.startswith(("http", "mailto:")):
            assert (document.parent / path).exists(), path
    for path in re.findall(r"`((?:\w+/)+[a-z]\w*\.(?:py|json|yaml|sh|sbatch))`", text):
        places = (ROOT, ROOT / "lbr_ds", document.parent)
        if path.split("/")[0] in {p.name for place in places for p in place.iterdir()}:
            assert any((place / path).is_file() for place in places), path


@documents
def test_commands_have_the_verbs_options_and_keys_that_they_name(document: Path) -> None:
    verbs = typer.main.get_command(app).commands
    for block in blocks(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", line.split(" #")[0]):
                words = shlex.split(part, comments=True) if "lbr-ds " in part else []
                if "lbr-ds" in words[:1]:
                    check_command(words[1:], verbs)


def check_command(words: list[str], verbs: dict[str, Any]) -> None:
    """Fail for a verb, an option or (with a shipped recipe) a key that does not exist."""
    if words[0].startswith("-"):
        return
    command = verbs[words[0]]
    if words[0] == "bench":
        command = command.commands[words[1]]
    options = {opt for parameter in command.params for opt in parameter.opts}
    named = {word.split("=")[0] for word in words if word.startswith("--")}
    assert named <= options | {"--help"}, words
    keys = [word for word in words if re.match(r"[a-z_0-9]+(\.[a-z_0-9]+)*=", word)]
    recipes = {path.stem for path in (ROOT / "lbr_ds" / "recipes").glob("*.yaml")}
    used = [Path(word).stem for word in words if Path(word).stem in recipes]
    if keys and used:
        load(used[0], [key for key in keys if not key.endswith(("=FILE", "=..."))])


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
        assert re.search(rf"pytest (-n 0 )?-m {suite}", (ROOT / "CONTRIBUTING.md").read_text())


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    releases = re.findall(
        r"^## (\d\S+) - \d{4}-", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert releases[0] == __version__
