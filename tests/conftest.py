"""What every test may use: tiny runs, made once."""

from __future__ import annotations

import json
import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, and several processes at a time
# No thread of pyarrow's allocator: a process with threads does not serve forks (`tests/forks.py`).
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")

import torch

from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.prepare import prepare
from tests.ranks import train_ranks
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


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws does not depend on the tests that its process has run before."""
    torch.manual_seed(2311)  # 0 is what `tiny.backbone` draws with


def with_scores(line: str) -> str:
    """The JSON line of a record with a teacher's scores, if it has a negative."""
    raw = json.loads(line)
    if raw["negatives"]:
        raw |= {"positive_scores": [len(raw["query"]) / 4], "negative_scores": [1.5]}
    return json.dumps(raw) + "\n"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny run that went through both stages on two ZeRO-3 ranks of `lbr-ds train`.

    Stage 2 also learns from a teacher's scores, which two thirds of the records have.
    """
    folder = tmp_path_factory.mktemp("trained")
    taught = {"loss": "kl", "teacher_temperature": 2.0}
    recipe = tiny_recipe(
        folder, prepared=False, stage2__matryoshka=[8, 4], stage2__distillation=taught
    )
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(map(with_scores, corpus.read_text().splitlines())))
    run = load(recipe)
    prepare(run.data, run.seed)
    for stage in (1, 2):
        train_ranks(2, recipe, stage)
    return load(recipe)
