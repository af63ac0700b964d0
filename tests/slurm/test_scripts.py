"""What can be said of the job scripts without a cluster."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lbr_ds.system import resources
from tests.ranks import run_cli

FOLDER = resources.shipped_folder("slurm")
SCRIPTS = sorted([*FOLDER.glob("*.sbatch"), *FOLDER.glob("*.sh")])
JOBS = [path for path in SCRIPTS if path.suffix == ".sbatch"]


def name(path: Path) -> str:
    return path.name


def test_the_scripts_are_there() -> None:
    assert [path.name for path in SCRIPTS] == [
        "benchmark.sbatch",
        "common.sh",
        "evaluate.sbatch",
        "pipeline.sh",
        "prepare.sbatch",
        "reproduce.sbatch",
        "reproduce.sh",
        "stage1.sbatch",
        "stage2.sbatch",
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_bash_parses_it(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_nothing_personal_and_no_placeholder_outside_edit_lines(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert not re.search(r"/(home|Users|root|scratch|work|data|mnt)/", text)
    assert not re.search(r"TODO|FIXME|XXX|<[A-Z_]+>|\{\{", text)


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_active_lines_suit_any_cluster(path: Path) -> None:
    active = re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(), re.MULTILINE)
    assert set(active) <= {
        "job-name",
        "output",
        "open-mode",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "requeue",
        "no-requeue",
        "signal",
    }
    assert "# EDIT" in path.read_text()


def test_readme_names_every_file_and_variable() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="ascii")
    for path in SCRIPTS:
        assert path.name in readme
    text = "".join(path.read_text() for path in SCRIPTS)
    # ${NAME:-default}: what the scripts take from outside.
    taken = set(re.findall(r"\$\{([A-Z_]+):-", text))
    taken = {one for one in taken if not one.startswith("SLURM_")}
    assert taken >= {"RECIPE", "OVERRIDES", "VENV", "LBR_DS", "LBR_SLURM", "SRUN_ARGS"}
    missing = sorted(one for one in taken if f"`{one}`" not in readme)
    assert not missing


def test_readmes_example_quotes_the_plan() -> None:
    """Each line of the example is one that its command prints now."""
    readme = (FOLDER / "README.md").read_text()
    example = readme[readme.index("## An example") :]
    command, quoted = re.findall(r"```\n(.*?)```", example, re.DOTALL)[:2]
    program, *words = command.split()
    done = run_cli(*words, COLUMNS="120")
    assert (program, done.returncode) == ("lbr-ds", 0), done.stderr
    printed = {line.rstrip() for line in done.stdout.splitlines()}
    assert [line for line in quoted.splitlines() if line not in printed] == []
