"""Loader processes are forks: what a rank holds when they start, each of them holds for good."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import load
from lbr_ds.distributed import World
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.training.feed import open_feed
from lbr_ds.training.session import text_tokenizer
from lbr_ds.training.stages import STAGES
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow


def test_loader_processes_start_before_the_engine(tmp_path: Path) -> None:
    """One that starts later doubles a rank's memory: it keeps what there was at the fork."""
    run_ranks("tests.training.forks", 2, str(tiny_recipe(tmp_path)), str(tmp_path))
    assert [(tmp_path / f"forks-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_a_loader_process_leaves_sigterm_to_its_rank(tmp_path: Path) -> None:
    """`scancel` sends it to every process of a job, and the rank still has to end its step."""
    run = load(tiny_recipe(tmp_path), ["data.workers=1"])
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    options: Any = {"start": 0, "stop": 12}
    source: Any = (run, STAGES[1], text_tokenizer(run), World())
    expected = [work.names for work in open_feed(*source, **options)]
    feed = open_feed(*source, **options)
    names = [next(feed).names]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    names += [work.names for work in feed]
    assert names == expected
