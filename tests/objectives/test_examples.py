"""The example at the head of each file of objectives/ runs as it is written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import lbr_ds.objectives

FILES = sorted(Path(lbr_ds.objectives.__path__[0]).glob("[a-z]*.py"))
IDEAS = [path.stem for path in FILES if "paper" in path.read_text() or ">>>" in path.read_text()]


@pytest.mark.parametrize("name", IDEAS)
def test_the_example_runs(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"lbr_ds.objectives.{name}"))
    assert found.attempted > 2
    assert found.failed == 0


def test_every_idea_has_an_example() -> None:
    named = {line.split(".py")[0] for line in (lbr_ds.objectives.__doc__ or "").splitlines()}
    assert {name for name in named if name in {path.stem for path in FILES}} == set(IDEAS)
