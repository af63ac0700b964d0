"""Loader processes are forks: what a rank holds when they start, each of them holds for good."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_ranks
from tests.tiny import tiny_recipe


def test_loader_processes_start_before_the_engine(tmp_path: Path) -> None:
    """One that starts later doubles a rank's memory: it keeps what there was at the fork."""
    run_ranks("tests.train.forks", 2, str(tiny_recipe(tmp_path)), str(tmp_path))
    assert [(tmp_path / f"forks-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
