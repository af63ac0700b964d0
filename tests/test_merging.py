"""Merged models: each tensor is the mean or the point on the arc, and the history is of all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lbr_ds import lineage
from lbr_ds.config import RunConfig
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.evaluation import evaluate
from lbr_ds.exporting import TOLERANCE, export
from lbr_ds.instructions import NAME as INSTRUCTIONS
from lbr_ds.instructions import Instructions, Used
from lbr_ds.merging import last_checkpoints, merge
from lbr_ds.records import Record
from lbr_ds.runs import changed, checkpoints, model_folder, seal_folder
from lbr_ds.shards import Manifest, write_split
from tests.mining.toy import file_bytes
from tests.ranks import run_cli
from tests.tiny import records

pytestmark = pytest.mark.slow
TEXTS = ["what is a cyst", "\u809d\u708e", "acute pain"]


@pytest.fixture(scope="module")
def sides(trained: RunConfig) -> tuple[Path, Path]:
    """Stage 2 and the backbone that it comes from."""
    return checkpoints(trained.run / "stage2")[-1] / "model", trained.run / "backbone"


def weights(folder: Path) -> dict[str, Tensor]:
    """By the names of a checkpoint, in fp32."""
    found = {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize("weight", [None, 0.7, 0.0, 1.0])
def test_linear_is_the_weighted_mean(
    sides: tuple[Path, Path], tmp_path: Path, weight: float | None
) -> None:
    merge(sides, tmp_path / "merged", weight=weight)
    share = 0.5 if weight is None else weight
    one, other, merged = map(weights, (*sides, tmp_path / "merged"))
    assert merged.keys() == one.keys()
    assert any((one[name] != other[name]).any() for name in one)
    for name, tensor in merged.items():
        wanted = share * one[name] + (1 - share) * other[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
    assert not changed(tmp_path / "merged")


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_slerp_is_the_point_on_the_arc(
    sides: tuple[Path, Path], tmp_path: Path, weight: float
) -> None:
    """In numpy and fp64: the angle to each side is its part of the whole; the length between."""
    merge(sides, tmp_path / "merged", weight=weight, method="slerp")
    for name, tensor in weights(tmp_path / "merged").items():
        a, b = (weights(side)[name].numpy().ravel() for side in sides)
        length = weight * np.linalg.norm(a) + (1 - weight) * np.linalg.norm(b)
        c = tensor.numpy().ravel()
        assert np.linalg.norm(c) == pytest.approx(length, rel=1e-5), name
        whole, part = angle(a, b), angle(a, c)
        assert part == pytest.approx((1 - weight) * whole, abs=1e-5), name
        assert part + angle(c, b) == pytest.approx(whole, abs=1e-5), name  # in one plane


def angle(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def test_three_share_alike_and_an_export_is_a_model_too(
    trained: RunConfig, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    """A checkpoint and its own export are one model; with stage 1 the mean of three."""
    exported, stage1 = tmp_path / "export", checkpoints(trained.run / "stage1")[-1]
    export(trained.run, exported)
    merge([sides[0], exported, stage1], tmp_path / "merged")
    two, one = weights(sides[0]), weights(stage1 / "model")
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, (2 * two[name] + one[name]) / 3, rtol=1e-6, atol=1e-7)
    assert not (tmp_path / "merged" / "parity.json").exists()


def test_a_merged_model_is_encoded_and_exported_as_any(
    trained: RunConfig, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its vectors lie between; it is exported with proof, and knows what it was trained on."""
    merged, exported = tmp_path / "merged", tmp_path / "export"
    words = ("merge", str(trained.run), str(sides[1]), "--weight", "0.5", "--out", str(merged))
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{merged}: merged from {sides[0]}, {sides[1]}\n"
    assert export(merged, exported)["largest_difference"] <= TOLERANCE
    vectors = [Encoder(place).encode_documents(TEXTS) for place in (*sides, merged, exported)]
    assert np.abs(vectors[2] - vectors[3]).max() <= TOLERANCE
    near = [(vectors[2] * other).sum(1).mean() for other in vectors[:2]]
    assert min(near) > (vectors[0] * vectors[1]).sum(1).mean()
    for folder in (merged, exported):
        found, own = lineage.load(folder), lineage.load(sides[0])
        assert found is not None
        assert own is not None
        assert found.history == own.history
        held = [block.hashes.tolist() for block in trained_texts.load(folder)]
        assert held == [block.hashes.tolist() for block in trained_texts.load(sides[0])]


def test_instructions_of_the_first_that_has_any(
    sides: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = []
    for number in range(2):
        shutil.copytree(sides[0], tmp_path / str(number))
        Instructions((Used("a", f"Find {number}: ", "", {"cl": 9}),)).save(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    merge([sides[1], *folders], tmp_path / "merged")
    assert "trained with different instructions" in caplog.text
    merged = (tmp_path / "merged" / INSTRUCTIONS).read_bytes()
    assert merged == (folders[0] / INSTRUCTIONS).read_bytes()


def test_what_does_not_fit_is_refused(
    trained: RunConfig, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(sides[0], other)
    kept = tmp_path / "kept"
    merge(sides, kept, weight=0.25)
    before = file_bytes(kept)
    for models, weight, method in (
        (sides[::-1], 0.25, "linear"),
        (sides, 0.3, "linear"),
        (sides, 0.25, "slerp"),
    ):
        with pytest.raises(ConfigError, match="exists and was not merged from these models"):
            merge(models, kept, weight=weight, method=method)  # type: ignore[arg-type]
    assert merge([other, sides[1]], kept, weight=0.25) == [other, sides[1]]  # of equal content
    assert file_bytes(kept) == before
    (kept / "lbr.json").unlink()
    with pytest.raises(CheckpointError, match=r"kept: is damaged \(lbr.json: missing\); remove it"):
        merge(sides, kept, weight=0.25)
    card = json.loads((other / "lbr.json").read_text())
    (other / "lbr.json").write_text(json.dumps({**card, "max_length": 31}))
    out = tmp_path / "merged"
    for models, options, words in (
        ((sides[0], other), {}, r"max_length of lbr.json is 32 and 31; merge models .* one back"),
        ((sides[0],), {}, "at least two models, 1 given"),
        (sides, {"weight": 1.5}, r"weight 1.5: give the first model's share, from 0 to 1"),
        ((*sides, other), {"method": "slerp"}, "slerp takes two models, 3 given; use linear"),
        (sides, {"method": "cubic"}, "choose one of linear, slerp"),
    ):
        with pytest.raises(ConfigError, match=words):
            merge(models, out, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"whole checkpoints, 99 are wanted; keep more"):
        last_checkpoints(trained.run, 99)
    assert not out.exists()


def test_a_checkpoint_of_a_run_is_the_best_the_last_or_a_step(
    trained: RunConfig, tmp_path: Path
) -> None:
    """By the nDCG@10 that was measured as each was saved."""
    run = tmp_path / "run"
    for step, ndcg in ((2, 0.3), (4, 0.5), (6, 0.4)):
        folder = run / "stage2" / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(checkpoints(trained.run / "stage2")[-1], folder)
        facts = json.loads((folder / "state.json").read_text())
        facts["evaluation"] |= {"ndcg_at_10": ndcg, "separation_ratio": 1 - ndcg}
        (folder / "state.json").write_text(json.dumps({**facts, "step": step}))
        (folder / "files.json").unlink()
        seal_folder(folder)
    for chosen, step in (("best", 4), ("last", 6), ("2", 2)):
        assert model_folder(run, chosen).parent.name == f"step-{step:06d}"
    assert model_folder(run).parent.name == "step-000004"
    with pytest.raises(CheckpointError, match=r"no checkpoint '3'; give best, last, or one of 2, "):
        model_folder(run, "3")
    assert last_checkpoints(run, 2) == checkpoints(run / "stage2")[-2:]
    done = run_cli("merge", str(run), "--last", "3", "--out", str(tmp_path / "mean"))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of other texts, with the ids of the run's data."""
    folder = tmp_path_factory.mktemp("others") / "general"
    other = [
        Record(
            id=row["id"],
            source="others",
            query=f"where is {row['positives'][0][-20:]}",
            positives=[f"at {row['query']}"],
        )
        for row in records(30, seed=5)
    ]
    files = write_split(folder, "eval", other, seed=0, records_per_shard=16)
    Manifest(folder, {"eval": files}, [], 0, "others", "test").save()
    return folder


def test_general_data_is_scored_beside_the_domain(
    trained: RunConfig, general: Path, sides: tuple[Path, Path]
) -> None:
    """As each alone, although both corpora have the same ids."""
    domain = trained.data.folder
    both = evaluate(str(sides[0]), data=domain, general=general)
    alone = [evaluate(str(sides[0]), data=place)["tasks"] for place in (domain, general)]
    assert both["tasks"] == {**alone[0], **alone[1]}
    assert list(both["tasks"]) == ["data-eval", "general-eval"]
    assert both["general"] == str(general)
    assert both["protocol"] == "random split"
    with pytest.raises(ConfigError, match="rename one folder"):
        evaluate(str(sides[0]), data=domain, general=domain)
    with pytest.raises(ConfigError, match="give both"):
        evaluate(str(sides[0]), general=general, tasks=["NFCorpus"])


def test_each_weight_is_scored_on_both_sides(
    trained: RunConfig, general: Path, sides: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "trade"
    places = ("--data", str(trained.data.folder), "--general", str(general))
    asked = ("merge", *map(str, sides), "--weights", "1,0.25,0", "--out", str(out))
    done = run_cli(*asked, *places)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "trade.json").read_text())
    merge(sides, tmp_path / "by-hand", weight=0.25)
    models = {0: sides[1], 0.25: tmp_path / "by-hand", 1: sides[0]}
    assert [row["weight"] for row in found["rows"]] == list(models)
    for row in found["rows"]:
        wanted = evaluate(str(models[row["weight"]]), data=trained.data.folder, general=general)[
            "tasks"
        ]
        assert row["domain"] == wanted["data-eval"]
        assert row["general"] == wanted["general-eval"]
        line = f"{row['domain']['ndcg_at_10']:.4f}"
        assert line in done.stdout
    assert (out / "weight-0.25" / "lbr.json").exists()
    before = file_bytes(out)
    again = run_cli(*asked, *places)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert file_bytes(out) == before
    for wrong in (("0,2", *places), ("0,x", *places), ("0,1",)):
        done = run_cli("merge", *map(str, sides), "--out", str(out), "--weights", *wrong)
        assert done.returncode == 2, done.stderr
