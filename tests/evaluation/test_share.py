"""Several ranks share the encoding: the vectors and the scores of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation import load_model
from tests.ranks import run_cli, run_ranks

pytestmark = pytest.mark.slow


def test_ranks_have_the_vectors_of_one(
    trained: RunConfig, sentence_folder: Path, tmp_path: Path
) -> None:
    run_ranks("tests.evaluation.share", 2, str(trained.run), str(sentence_folder), str(tmp_path))
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    for kind in ("own", "stock"):
        assert np.array_equal(first[kind], second[kind])
        np.testing.assert_allclose(first[kind], first[f"{kind}_alone"], rtol=0, atol=1e-5)
        assert len(np.unique(first[kind].round(4), axis=0)) > 7  # a wrong order would show


def test_eval_by_two_ranks_scores_as_one(trained: RunConfig, tmp_path: Path) -> None:
    """The same figures, one table, one file; answers are written by the first rank alone."""
    found = []
    for ranks in ("1", "2"):
        out = tmp_path / f"{ranks}.json"
        done = run_cli(
            "eval",
            str(trained.run),
            "--data",
            str(trained.data.folder),
            "--out",
            str(out),
            "--generation",
            "--max-queries",
            "8",
            "--nproc",
            ranks,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"written to {out}") == 1
        assert done.stdout.count("R@10") == 2  # of the task, and of truncated vectors
        found.append(json.loads(out.read_text()))
    one, two = found
    assert one.keys() == two.keys()
    assert one["generation"] == two["generation"]
    assert one["per_query"] == two["per_query"]
    (ours,), (theirs,) = one["tasks"].values(), two["tasks"].values()
    for ours_row, theirs_row in zip(ours.pop("compressed"), theirs.pop("compressed"), strict=True):
        assert ours_row.pop("precision") == theirs_row.pop("precision")
        assert ours_row == pytest.approx(theirs_row, rel=1e-3)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "2.json"]


@pytest.mark.parametrize("name", ["bm25", "BAAI/bge-m3"])
def test_models_that_cannot_share_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: 2 ranks cannot share its work"):
        load_model(name, world=World(rank=1, size=2))


def test_a_refusal_is_one_line() -> None:
    done = run_cli("eval", "bm25", "--tasks", "NFCorpus", "--nproc", "2")
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.splitlines() == [
        "lbr-ds: error: bm25: 2 ranks cannot share its work, only that of a folder, a run or a "
        "checkpoint; start one process (--nproc 1)"
    ]
