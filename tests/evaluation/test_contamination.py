"""A model of ours is not scored on what it was trained on, unless told so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lbr_ds.cli import app
from lbr_ds.config import load
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.errors import CheckpointError, DataError
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.evaluation.contamination import texts_trained_on
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split, write_split
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkpoint's `model/` holds; ../data is what it was trained on."""
    run = load(tiny_recipe(tmp_path_factory.mktemp("overlap")))
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", 0)
    folder = run.run.parent / "model"
    shutil.copytree(run.run / "backbone", folder)
    trained_texts.save(trained_texts.of_data(run.data.folder), folder)
    return folder


@pytest.fixture(scope="module")
def planted(model: Path) -> Path:
    """A set of 20 new pairs and, in other letters, two queries of cl and a passage of gl."""
    data = model.parent / "data"
    new = [Record(f"n{i}", "s", f"something new {i}", [f"nothing of old {i}"]) for i in range(20)]
    old = [
        Record(f"o{i}", "s", record.query.upper() + "?", [f"unseen answer {i}"])
        for i, record in enumerate(list(read_split(data, "cl"))[:2])
    ]
    passage = next(read_split(data, "gl")).positives[0].replace(" ", "  ")
    records = [*new, *old, Record("p", "s", "who is it", [passage])]
    folder = model.parent / "planted"
    files = write_split(folder, "eval", records, seed=0, records_per_shard=64)
    Manifest(folder, {"eval": files}, [], 0, "planted", "test").save()
    return folder


def test_planted_overlap_is_refused_and_allowed_by_the_flag(
    model: Path, planted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    command = ["eval", str(model), "--data", str(planted), "--out", str(out)]
    refused = CliRunner().invoke(app, command).exception
    assert isinstance(refused, DataError)
    assert refused.exit_code == 3
    line = str(refused)
    for part in (
        "trained on texts of planted-eval: 2 of 23 queries and 1 of 23 passages",
        "such as 'WHAT IS",
        "--allow-overlap",
    ):
        assert part in line
    assert not out.exists()
    done = CliRunner().invoke(app, [*command, "--allow-overlap"])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["overlap"] == {"planted-eval": {"queries": 2, "passages": 1}}
    assert result["tasks"]["planted-eval"]["queries"] == 23


def test_its_own_held_out_split_is_scored(model: Path) -> None:
    assert "overlap" not in evaluate(
        str(model), data=model.parent / "data", options=EvalOptions(max_queries=5)
    )


def test_a_model_without_hashes_is_not_asked(model: Path, planted: Path) -> None:
    bare = model.parent / "run" / "backbone"
    assert texts_trained_on(str(bare)) == []
    assert texts_trained_on("some/name") == []
    assert evaluate(str(bare), data=planted)["tasks"]


def test_the_file_holds_every_training_text(model: Path) -> None:
    data = model.parent / "data"
    (trained,) = texts_trained_on(str(model))
    assert trained.fingerprint == Manifest.load(data).fingerprint
    for split, expected in (("gl", True), ("cl", True), ("eval", False)):
        texts = [t for r in read_split(data, split) for t in (r.query, *r.positives)]
        assert (trained.holds(texts) == expected).all()
    assert len(trained.holds([])) == 0
    path = model / trained_texts.NAME
    head, _, body = path.read_bytes().partition(b"\n")
    assert len(body) == 8 * json.loads(head)["count"] == 8 * len(trained.hashes)


@pytest.mark.parametrize("cut", [slice(None, -3), slice(5, None), slice(0, 0)])
def test_a_damaged_file_is_named(model: Path, tmp_path: Path, cut: slice) -> None:
    (tmp_path / trained_texts.NAME).write_bytes((model / trained_texts.NAME).read_bytes()[cut])
    with pytest.raises(CheckpointError, match=r"trained\.u64: not a valid trained\.u64; restore"):
        trained_texts.load(tmp_path)


def test_the_hashes_stay_on_disk_and_unchanged_files_too(tmp_path: Path) -> None:
    """They are mapped; a file that is the same already keeps its place; a shifted one is read."""
    texts = trained_texts.TrainedTexts("print", np.arange(1000, dtype=np.uint64) * np.uint64(7))
    other = trained_texts.TrainedTexts("mined-other", np.arange(5, dtype=np.uint64))
    trained_texts.save([texts, other], tmp_path / "a")
    found = trained_texts.load(tmp_path / "a")
    for block, given in zip(found, (texts, other), strict=True):
        assert isinstance(block.hashes, np.memmap)
        assert block.hashes.flags.aligned
        assert block.fingerprint == given.fingerprint
        assert np.array_equal(block.hashes, given.hashes)
    before = (tmp_path / "a" / trained_texts.NAME).stat()
    trained_texts.save([*found, *found], tmp_path / "a")
    assert (tmp_path / "a" / trained_texts.NAME).stat().st_ino == before.st_ino
    later = trained_texts.TrainedTexts("again-other", np.arange(3, 9, dtype=np.uint64))
    trained_texts.save([*found, later], tmp_path / "a")
    united = trained_texts.load(tmp_path / "a")[1]
    assert (united.fingerprint, united.hashes.tolist()) == ("again-other", list(range(9)))
    head = b'{"version": 1, "fingerprint": "f", "count": 2}\n'  # not filled with blanks
    assert len(head) % 8
    (tmp_path / trained_texts.NAME).write_bytes(head + np.array([3, 5], "<u8").tobytes())
    assert trained_texts.load(tmp_path)[0].hashes.tolist() == [3, 5]
