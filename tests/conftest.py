"""What every test may use: tiny runs, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a tiny run whose data is prepared; do not train in its run folder."""
    from tests.tiny import tiny_recipe

    return tiny_recipe(tmp_path_factory.mktemp("tiny"))
