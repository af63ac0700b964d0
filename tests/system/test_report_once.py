"""What all ranks of a machine end with is printed once; what one of them ends with, by that one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lbr_ds.system import report_once as module
from lbr_ds.system.report_once import report_once
from tests.ranks import ended_ranks
from tests.tiny import tiny_recipe


@pytest.mark.parametrize(
    ("key", "line", "code"),
    [
        ("stage1.num_stepz=3", "stage1.num_stepz", 2),  # before they join
        ("data.folder=MISSING", "MISSING", 3),  # after
    ],
)
def test_ranks_print_one_line(tmp_path: Path, key: str, line: str, code: int) -> None:
    recipe = tiny_recipe(tmp_path, count=40)
    codes, said = ended_ranks("lbr_ds", 2, "train", str(recipe), "--stage", "1", key)
    assert codes == [code, code], said
    (error,) = [e for e in "".join(said).splitlines() if e.startswith("lbr-ds: error:")]
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lines", [["same"] * 3, ["one", "two", "two"], ["a", "b", "c"]])
def test_every_line_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """By rank 0 and by each rank with another line; none is lost."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 60.0 if len({*lines}) == 1 else 1.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(lines)))
    children = []
    for rank, line in enumerate(lines):
        if (child := os.fork()) == 0:
            os.environ["LOCAL_RANK"] = str(rank)
            report_once(line, (tmp_path / str(rank)).touch)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(lines)
    expected = [str(rank) for rank, line in enumerate(lines) if rank == 0 or line != lines[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_without_a_launcher_it_is_printed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    report_once("a line", (tmp_path / "said").touch)
    assert (tmp_path / "said").exists()
