"""The whole way: a folder on disk -> scores, examples and OUT.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.encoder import Encoder
from lbr_ds.errors import ConfigError, EnvironmentProblem
from lbr_ds.evaluation import EvalOptions, evaluate, official_tasks, score_task
from lbr_ds.evaluation.library_logs import silence_libraries
from lbr_ds.records import Record


def test_a_sentence_transformers_folder(sentence_folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "eval" / "stage2.json"
    result = evaluate(
        str(sentence_folder),
        data=data,
        output=output,
        options=EvalOptions(examples=4, batch_size=8),
    )
    assert json.loads(output.read_text()) == result
    assert list(output.parent.iterdir()) == [output]
    assert set(result) == {
        "model",
        "checkpoint",
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
    assert result["checkpoint"] is None  # a folder of sentence-transformers
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


def test_examples_are_what_the_vectors_say(
    sentence_folder: Path, data: Path, records: list[Record]
) -> None:
    """Rank by hand, with the vectors of the public encoder."""
    result = evaluate(str(sentence_folder), data=data, options=EvalOptions(examples=40))
    examples = {example["id"]: example for example in result["examples"]}
    assert set(examples["q4"]["answers"]) == {"answer 4", "second answer 4"}
    assert set(examples["use1"]["answers"]) == {"one use", "another use"}
    corpus = sorted({t for r in records for t in (*r.positives, *r.negatives)})
    encoder = Encoder(sentence_folder)
    queries = encoder.encode_queries([example["query"] for example in examples.values()])
    scores = queries @ encoder.encode_documents(corpus).T
    for example, row in zip(examples.values(), scores, strict=True):
        top = sorted(row, reverse=True)
        best = max(row[corpus.index(text)] for text in example["answers"])
        assert [p["score"] for p in example["passages"]] == pytest.approx(top[:3], abs=1e-4)
        for passage in example["passages"]:
            assert passage["score"] == pytest.approx(row[corpus.index(passage["text"])], abs=1e-4)
            assert passage["right"] == (passage["text"] in example["answers"])
        first, near = example["first_right"], 1e-6  # equal scores may come in any order
        assert (row > best + near).sum() < first <= (row > best - near).sum()


def test_the_corpus_is_encoded_once(
    encoder: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbr_ds.evaluation.evaluation.load_model", lambda *args, **kwargs: encoder)
    evaluate("any", data=data, options=EvalOptions(examples=5))
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
        score_task(encoder, task)


def test_quiet_gives_back_what_it_took() -> None:
    logger = logging.getLogger("mteb")
    logger.setLevel(logging.INFO)
    with silence_libraries():
        assert logger.level == logging.ERROR
    assert logger.level == logging.INFO
    logger.setLevel(logging.NOTSET)
