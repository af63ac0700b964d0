"""Several ranks share the models' vectors: the same files, byte for byte, as one makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.distributed import World
from lbr_ds.errors import ConfigError
from lbr_ds.mining import vectors
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.system import blocks
from tests.mining.toy import Words, file_bytes
from tests.ranks import ended_ranks, run_cli
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(blocks, "ROWS", 16)
    texts = [f"text {i}" for i in range(16 * 4 + 5)]
    whole = vectors.embed(texts, Words(), "query", tmp_path / "one")
    made = []
    for rank in range(ranks):
        encoder: Any = Words()
        place = World(rank=rank, size=ranks)
        vectors.embed_share(texts, encoder, "query", tmp_path / "some", place)
        made.append(encoder.texts)
    assert sum(made) == len(texts)
    assert min(made) >= 16
    assert file_bytes(tmp_path / "some") == file_bytes(tmp_path / "one")
    last = Words()
    found = vectors.embed(texts, last, "query", tmp_path / "some")
    assert last.texts == 0
    everything = np.arange(len(texts))
    assert np.array_equal(found.rows(everything), whole.rows(everything))


def test_mine_by_two_ranks_is_mine_by_one(tmp_path: Path) -> None:
    """On the command line, with a model and more passages than one block holds."""
    recipe = tiny_recipe(
        tmp_path,
        count=900,
        data__splits={"gl": 0.1, "cl": 0.8, "eval": 0.1},
        data__near_duplicate=1,
    )
    model = ModelConfig(backbone=str(tmp_path / "backbone"), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), tmp_path / "run" / "backbone", 0)
    data, found = tmp_path / "data", []
    shutil.copytree(data, tmp_path / "prepared")
    for ranks in ("1", "2"):
        done = run_cli(
            "mine",
            str(recipe),
            "mining.methods=[dense]",
            f"mining.model={tmp_path / 'run'}",
            "--nproc",
            ranks,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1
        work = file_bytes(tmp_path / "data.mining")
        assert sum(name.endswith("00001.npy") for name in work) > 0
        found.append({**work, **file_bytes(data)})
        shutil.rmtree(data)
        shutil.rmtree(tmp_path / "data.mining")
        shutil.copytree(tmp_path / "prepared", data)
    assert found[0] == found[1]


def test_another_number_of_ranks_than_the_launchers_is_refused(tmp_path: Path) -> None:
    """In one line, which one of the two ranks prints."""
    codes, outputs = ended_ranks("lbr_ds", 2, "mine", str(tiny_recipe(tmp_path)), "--nproc", "3")
    assert codes == [ConfigError.exit_code] * 2, outputs
    line = "--nproc 3: a launcher has already started 2 ranks; leave --nproc out"
    assert "".join(outputs).count(line) == 1, outputs
