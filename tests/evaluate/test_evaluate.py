"""The whole way: a folder on disk -> scores, examples and OUT.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.evaluate import evaluate, official_tasks, top_passages
from lbr_ds.evaluate.quiet import quiet
from lbr_ds.evaluate.run import judge
from lbr_ds.records import Record


def test_a_sentence_transformers_folder(sentence_folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval" / "stage2.json"
    result = evaluate(str(sentence_folder), data=data, output=output, examples=4, batch_size=8)
    assert json.loads(output.read_text()) == result
    assert list(output.parent.iterdir()) == [output]
    assert set(result) == {
        "model",
        "data",
        "protocol",
        "max_queries",
        "seed",
        "seconds",
        "tasks",
        "per_query",
        "environment",
        "examples",
    }
    assert result["protocol"] == "random split"
    scores = result["tasks"]["corpus-eval"]
    assert set(scores) == {
        "recall_at_10",
        "ndcg_at_10",
        "mrr_at_10",
        "queries",
        "documents",
        "separation_ratio",
        "alignment",
        "uniformity",
        "effective_rank",
    }
    assert scores["queries"] == len(result["per_query"]["corpus-eval"]) == 40
    assert [len(e["passages"]) for e in result["examples"]] == [3] * 4


def test_examples_are_what_the_ranking_says(
    sentence_folder: Path, data: Path, tmp_path: Path
) -> None:
    first, second = top_passages(str(sentence_folder), data, ["q4", "use1"], k=70)
    assert (first["query"], first["answers"]) == ("question 4", ["answer 4", "second answer 4"])
    assert set(second["answers"]) == {"one use", "another use"}
    for example in (first, second):
        scores = [passage["score"] for passage in example["passages"]]
        assert scores == sorted(scores, reverse=True)
        right = [rank for rank, p in enumerate(example["passages"], 1) if p["right"]]
        assert example["first_right"] == right[0]
        assert {p["text"] for p in example["passages"] if p["right"]} == set(example["answers"])


def test_the_corpus_is_encoded_once(
    encoder: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbr_ds.evaluate.run.load_model", lambda *args, **kwargs: encoder)
    evaluate("any", data=data, examples=5)
    assert len(encoder.calls) == len(set(encoder.calls))


def test_bm25_is_a_model_by_that_name(data: Path, records: list[Record]) -> None:
    """Of words that stand in one question and one answer it finds every one; it has no vectors."""
    words = ["amber", "basalt", "cobalt", "dolomite", "ember", "feldspar", "granite", "halite"]
    records[:] = [
        Record(w, "s", f"tell me of {w}", [f"{w} is a stone of the {i}th kind"])
        for i, w in enumerate(words)
    ]
    scores = evaluate("bm25", data=data)["tasks"]["corpus-eval"]
    assert scores["recall_at_10"] == scores["ndcg_at_10"] == 1
    assert "separation_ratio" not in scores


def test_nothing_to_do() -> None:
    with pytest.raises(ConfigError, match="give data, or tasks"):
        evaluate("any")


def test_a_task_that_cannot_be_fetched(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = official_tasks(["NFCorpus"])[0]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network\nlong tail")

    monkeypatch.setattr(task, "load_data", fail)
    with pytest.raises(EnvironmentProblem, match="texts of task NFCorpus: no network"):
        judge(encoder, task)


def test_quiet_gives_back_what_it_took() -> None:
    logger = logging.getLogger("mteb")
    logger.setLevel(logging.INFO)
    with quiet():
        assert logger.level == logging.ERROR
    assert logger.level == logging.INFO
    logger.setLevel(logging.NOTSET)
