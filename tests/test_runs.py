"""Which run a path is part of."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_ds.runs import run_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose parent folder holds a recipe of its own."""
    made = tmp_path / "run"
    for name in ("backbone", "stage1/checkpoints/step-000003/model", "eval", "exported"):
        (made / name).mkdir(parents=True)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for folder in (tmp_path, made):
        (folder / "recipe.yaml").write_text("name: x\n")
    return made


@pytest.mark.parametrize(
    "part", [".", "backbone", "stage1", "stage1/checkpoints/step-000003/model"]
)
def test_a_run_and_its_parts(run: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_of(run / part) == run
    monkeypatch.chdir(run.parent)
    assert run_of(Path("run") / part).resolve() == run  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["run/exported", "run/eval", "models/base", "models", "."])
def test_a_recipe_in_a_parent_folder_makes_no_run(run: Path, place: str) -> None:
    assert run_of(run.parent / place) is None
