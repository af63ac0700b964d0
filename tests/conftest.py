"""What every test may use: tiny runs, made once."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, and several processes at a time

from lbr_ds.config import RunConfig, load
from tests.ranks import run_cli
from tests.tiny import tiny_recipe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest file first, and mark as slow what needs longer than the whole suite has.

    A file that is started last would run alone at the end. What a marker of its own leaves out of
    `pytest` must not come back with `pytest -m "not slurm and not slow"`, whose -m replaces ours.
    """
    for item in items:
        if any(item.get_closest_marker(name) for name in ("suites", "stacks", "kills")):
            item.add_marker(pytest.mark.slow)
        if "trained" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)  # the run that it needs takes a minute
    items.sort(key=lambda item: "slurm" not in item.path.parts)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny run that went through both stages on two ZeRO-3 ranks, by the command line."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("trained"), stage2__matryoshka=[8, 4])
    for stage in ("1", "2"):
        done = run_cli("train", str(recipe), "--stage", stage, "--nproc", "2")
        assert done.returncode == 0, done.stderr
    return load(recipe)
