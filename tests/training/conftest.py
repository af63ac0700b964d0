"""A run to break: a copy of the one that was trained once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lbr_ds.config import RunConfig


@pytest.fixture
def copied(trained: RunConfig, tmp_path: Path) -> Path:
    """A recipe whose run folder is a copy of the trained one."""
    shutil.copytree(trained.run, tmp_path / "run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(trained.dump().replace(str(trained.run), str(tmp_path / "run")))
    return recipe
