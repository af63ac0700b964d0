"""Evaluation in training is the final one, on any number of ranks, and changes nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from lbr_ds.batching import Sequence, TextTokenizer
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import World
from lbr_ds.evaluation import evaluate
from lbr_ds.model.bottleneck import load_tokenizer
from lbr_ds.records import Record
from lbr_ds.runs import best_first, checkpoints, evaluation
from lbr_ds.shards import Manifest, read_split, write_split
from lbr_ds.training.held_out import read_held_out_sample
from tests.dense import dense_mask
from tests.faults.compare import differing_bits
from tests.ranks import run_cli, run_ranks, train_ranks
from tests.tiny import tiny_recipe
from tests.training.examine import CASES
from tests.training.test_resume import evaluations, metrics, weights

pytestmark = pytest.mark.slow

WORLDS = (1, 3)
LOSSES = ("loss", "loss_without_bottleneck")


@pytest.fixture(scope="module")
def examined(
    trained: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[str, Any]]:
    """(case, world) -> figures."""
    out = tmp_path_factory.mktemp("examined")
    for world in WORLDS:
        run_ranks("tests.training.examine", world, str(trained.run / "recipe.yaml"), str(out))
    pairs = [(case, world) for case in CASES for world in WORLDS]
    return {(c, w): json.loads((out / f"{c}-{w}.json").read_text()) for c, w in pairs}


@pytest.mark.parametrize("stage", [1, 2])
def test_at_full_size_it_is_the_final_evaluation(
    trained: RunConfig, examined: dict[tuple[str, int], dict[str, Any]], stage: int
) -> None:
    """mteb's figures, for the engine on one rank and three, and for what two ranks saved."""
    newest = checkpoints(trained.run / f"stage{stage}")[-1]
    scores = evaluate(str(newest), data=str(trained.data.folder))["tasks"]["data-eval"]
    case = {1: "one", 2: "two"}[stage]
    for figures in (evaluation(newest), *(examined[case, world] for world in WORLDS)):
        assert (figures["queries"], figures["passages"]) == (scores["queries"], scores["documents"])
        for name in (
            "recall_at_10",
            "ndcg_at_10",
            "separation_ratio",
            "alignment",
            "uniformity",
            "effective_rank",
        ):
            assert figures[name] == pytest.approx(scores[name], rel=2e-4), name
    assert 0 < scores["ndcg_at_10"] < 1


@pytest.mark.parametrize("case", CASES)
def test_ranks_and_micro_batches_do_not_matter(
    examined: dict[tuple[str, int], dict[str, Any]], case: str
) -> None:
    """With fewer texts than ranks too; every seconds is its own."""
    one, more = ({**examined[case, world], "seconds": 0} for world in WORLDS)
    assert one == pytest.approx(more, rel=2e-4)
    if case == "one-cut":
        whole = {**examined["one", 1], "seconds": 0}
        assert one == pytest.approx(whole, rel=2e-4)
    assert ("loss" in one) is (case != "two")
    if case == "one-few":
        assert (one["queries"], one["passages"]) == (2, 5)


def loss_by_hand(run: RunConfig, hide: bool) -> float:
    """Per token of Y, one sequence at a time, the rule of what Y sees as a dense mask."""
    folder = checkpoints(run.run / "stage1")[-1] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = TextTokenizer(
        load_tokenizer(folder), max_length=run.model.max_length, num_bottleneck=run.bottleneck.count
    )
    total, count = 0.0, 0
    for record in read_split(run.data.folder, "eval"):
        seq: Sequence = generative_sequence(
            record, "ib_sft", tokenizer, turn=0, max_target_length=32
        )
        mask, length = dense_mask([seq]), len(seq.context)
        if hide:
            mask[length:, :length] = False
        with torch.no_grad():
            ids = torch.tensor([seq.context + seq.target])
            logits = model(ids, attention_mask=mask[None, None]).logits[0, length - 1 : -1]
        wanted = torch.tensor(seq.target)
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        count += len(seq.target)
    return total / count


def test_the_ablation_hides_the_bottleneck_from_y(
    trained: RunConfig, examined: dict[tuple[str, int], dict[str, Any]]
) -> None:
    for name, hide in zip(LOSSES, (False, True), strict=True):
        for world in WORLDS:
            expected = loss_by_hand(trained, hide)
            assert examined["one", world][name] == pytest.approx(expected, rel=1e-5)
    mixed = examined["one-mixed", 1]
    assert mixed["loss"] != pytest.approx(examined["one", 1]["loss"], rel=1e-3)
    assert mixed["loss_without_bottleneck"] != pytest.approx(mixed["loss"], rel=1e-4)


def test_training_is_the_same_bit_for_bit_without_it(trained: RunConfig, tmp_path: Path) -> None:
    """Weights, optimizer and random states, losses; of both stages."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(trained.dump().replace(str(trained.run), str(tmp_path / "run")))
    line = (trained.run / "stage2" / "starts.jsonl").read_text().splitlines()[0]
    origin = int(Path(json.loads(line)["from"]).name.removeprefix("step-"))
    for stage in (1, 2):
        train_ranks(2, recipe, stage, "every.evaluate=null", f"stage2.from={origin}")
        ours, theirs = (folder / f"stage{stage}" for folder in (tmp_path / "run", trained.run))
        assert not (ours / "evaluations.jsonl").exists()
        assert evaluation(checkpoints(ours)[-1]) == {}
        assert evaluation(checkpoints(theirs)[-1])
        assert differing_bits(ours, theirs) == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_figures_go_to_the_file_to_tensorboard_and_into_the_checkpoint(
    trained: RunConfig, stage: int
) -> None:
    folder = trained.run / f"stage{stage}"
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    found = {line.pop("step"): line for line in map(json.loads, lines)}
    assert found == {int(p.name[-6:]): evaluation(p) for p in checkpoints(folder)}
    assert list(found) == [3, 6]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for name in ("ndcg_at_10", *(LOSSES if stage == 1 else ())):
        shown = [(e.step, e.value) for e in board.Scalars(f"evaluation/{name}")]
        assert shown == [(step, pytest.approx(found[step][name])) for step in (3, 6)]
    assert "step 6, held out: R@10" in (folder / "log" / "rank-0.log").read_text()


def test_more_often_than_it_saves(trained: RunConfig, tmp_path: Path) -> None:
    """And without the other figures of the run changing the sample."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(trained.dump().replace(str(trained.run), str(tmp_path / "run")))
    done = run_cli(
        "train",
        str(recipe),
        "--stage",
        "1",
        "every.evaluate=4",
        "every.save=5",
        "evaluation.max_queries=10",
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "stage1" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 6]
    assert {json.loads(line)["queries"] for line in lines} == {10}


def test_without_queries_it_is_off(
    trained: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [Record(id=f"t{n}", source="made-up", text=f"a text {n}") for n in range(3)]
    folder = tmp_path / "plain"
    files = write_split(folder, "eval", texts, seed=0, records_per_shard=16)
    for splits, why in (({"eval": files}, "holds no query"), ({}, "no split 'eval'")):
        Manifest(folder, splits, [], 0, "made", "test").save()
        run = load(trained.run / "recipe.yaml", [f"data.folder={folder}"])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lbr_ds"):
            assert read_held_out_sample(run, World()) is None
        (line,) = caplog.messages
        assert line.startswith("training without evaluation: ")
        assert why in line
    off = load(trained.run / "recipe.yaml", ["every.evaluate=null"])
    assert read_held_out_sample(off, World()) is None


def test_the_sample_has_all_right_answers_and_is_drawn_by_seed(trained: RunConfig) -> None:
    path = trained.run / "recipe.yaml"
    few = ["evaluation.max_queries=10", "evaluation.max_passages=20"]
    first, again, other = (
        read_held_out_sample(load(path, [*few, *more]), World()) for more in ([], [], ["seed=1"])
    )
    assert first is not None
    assert other is not None
    assert first == again
    assert first.judged != other.judged
    assert len(first.judged.queries) == len(first.records) == 10
    assert len(first.judged.documents) == 20
    for (query_id, text), record in zip(first.judged.queries.items(), first.records, strict=True):
        assert text == record.query
        answers = {first.judged.documents[i] for i in first.judged.relevant[query_id]}
        assert answers == set(record.positives)
    tight = read_held_out_sample(load(path, ["evaluation.max_passages=1"]), World())
    assert tight is not None
    assert len(tight.judged.documents) == len(tight.judged.queries) == 48


def test_a_stage_without_gain_ends_and_stays_ended(trained: RunConfig, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 nothing rises after the first evaluation."""
    words = (
        f"run={tmp_path / 'run'}",
        f"stage2.from={trained.run / 'backbone'}",
        "stage2.optim.lr=1e-30",
        "stage2.patience=2",
        "every.evaluate=1",
    )
    recipe = str(trained.run / "recipe.yaml")
    done = run_cli("train", recipe, "--stage", "2", *words)
    assert done.returncode == 0, done.stderr
    assert "stage 2 ends at step 3 of 6: nDCG@10 has not risen in the last 2" in done.stderr
    (saved,) = checkpoints(tmp_path / "run" / "stage2")
    assert saved.name == "step-000003"
    again = run_cli("train", recipe, "--stage", "2", *words)
    assert again.returncode == 0, again.stderr
    assert checkpoints(tmp_path / "run" / "stage2") == [saved]
    lifted = run_cli("train", recipe, "--stage", "2", *words, "stage2.patience=null")
    assert lifted.returncode == 0, lifted.stderr
    assert [path.name[-1] for path in checkpoints(tmp_path / "run" / "stage2")] == ["3", "6"]


def test_an_evaluation_that_a_signal_prevents_is_made_by_the_resume(tmp_path: Path) -> None:
    """The stage ends at the same step, with the same evaluations, best checkpoint and weights."""
    run_ranks("tests.training.interrupted", 2, str(tiny_recipe(tmp_path)), str(tmp_path))
    for name, last in (("patience", 3), ("saves", 6)):
        whole, stopped = (tmp_path / name / kind / "stage2" for kind in ("whole", "stopped"))
        assert [line["step"] for line in evaluations(stopped)] == (
            [1, 2, 3] if name == "patience" else [3, 6]
        )
        assert evaluations(stopped) == evaluations(whole)
        assert metrics(stopped) == metrics(whole)
        assert weights(stopped) == weights(whole)
        names, figures = (
            [[value(path) for path in checkpoints(stage)] for stage in (whole, stopped)]
            for value in (lambda path: path.name, lambda path: without_seconds(evaluation(path)))
        )
        assert names[0] == names[1]
        assert names[0][-1] == f"step-{last:06d}"
        assert figures[0] == figures[1]
        best = [
            [path.name for path in best_first(checkpoints(stage))] for stage in (whole, stopped)
        ]
        assert best[0] == best[1]
        assert len(best[0]) == len(names[0])


def without_seconds(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "seconds"}
