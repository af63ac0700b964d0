"""A causal language model in this process: ranks and resumes do not change its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import World
from lbr_ds.errors import ConfigError
from lbr_ds.synthesis.answers import Answers
from lbr_ds.synthesis.ask import ask
from lbr_ds.system.progress import no_progress
from tests.tiny import tiny_recipe

PASSAGES = {f"{i:02x}": f"passage {i} about the liver" for i in range(7)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Batches of two passages, and a tiny model whose answers are sampled."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("local"), prepared=False)
    return load(recipe, ["synthesis.concurrency=2", "synthesis.max_tokens=6"])


def answers(run: RunConfig, work: Path, size: int = 1) -> dict[str, str | None]:
    for rank in range(size):
        answers, refused = ask(run, PASSAGES, work, World(rank=rank, size=size), no_progress)
        assert not refused
    stored = Answers(answers.folder)
    return {name: stored.get(name) for name in PASSAGES}


def test_ranks_and_resumes_give_the_same_answers(run: RunConfig, tmp_path: Path) -> None:
    whole = answers(run, tmp_path / "one")
    assert all(whole.values())
    assert len(set(whole.values())) == len(whole)
    assert answers(run, tmp_path / "two", size=2) == whole
    names = [path.name for path in sorted((tmp_path / "two").glob("*/*"))]
    assert names == ["answers-0.jsonl", "answers-1.jsonl"]
    (file,) = (tmp_path / "one").glob("*/*")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], *lines[4:]])[:-3])  # lost in two batches, one cut
    assert answers(run, tmp_path / "one") == whole
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    greedy = run.model_copy(
        update={"synthesis": run.synthesis.model_copy(update={"temperature": 0.0})}
    )
    assert answers(greedy, tmp_path / "one") != whole


def test_a_model_that_is_not_there(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    named = run.synthesis.model_copy(update={"model": str(tmp_path / "empty")})
    with pytest.raises(ConfigError, match=r"synthesis\.model='.*empty' holds no \.safetensors"):
        answers(run.model_copy(update={"synthesis": named}), tmp_path / "work")
