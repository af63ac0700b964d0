"""The held-out task against a computation by hand; names of official tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.errors import ConfigError, DataError
from lbr_ds.evaluation import held_out_tasks, official_tasks, score_task, split_names
from lbr_ds.evaluation.retrieval_metrics import rank_scores
from lbr_ds.instructions import bare
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, write_split


def scores_by_hand(
    encoder: Any, records: list[Record], instructed: bool = False
) -> dict[str, float]:
    """Recall@10, ndcg@10 and mrr@10, from their definitions."""
    corpus = sorted({t for r in records for t in (*r.positives, *r.negatives)})
    vectors = np.stack([encoder.vector(text) for text in corpus])
    recalls, gains, ranks = [], [], []
    for record in records:
        right = set(record.positives)
        if record.group == "it":
            right = {"one use", "another use"}
        asked = record.instruction * instructed + record.query
        order = np.argsort(-vectors @ encoder.vector(asked))
        hits = np.array([corpus[i] in right for i in order[:10]], float)
        discount = 1 / np.log2(np.arange(2, 12))
        recalls.append(hits.sum() / len(right))
        gains.append((hits * discount).sum() / discount[: len(right)].sum())
        ranks.append(1 / (hits.argmax() + 1) if hits.any() else 0.0)
    means = [float(np.mean(values)) for values in (recalls, gains, ranks)]
    return dict(zip(("recall_at_10", "ndcg_at_10", "mrr_at_10"), means, strict=True))


def test_scores_equal_the_definitions(encoder: Any, data: Path, records: list[Record]) -> None:
    task = held_out_tasks(data)[0]
    scores = score_task(encoder, task)
    assert scores["queries"] == 40
    assert scores["documents"] == len({t for r in records for t in (*r.positives, *r.negatives)})
    expected = scores_by_hand(encoder, records)
    assert 0 < expected["ndcg_at_10"] < 1
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=2e-5)
    assert np.mean(list(task.per_query.values())) == pytest.approx(expected["ndcg_at_10"], abs=2e-5)
    assert "question 0" in encoder.calls
    assert "Find: question 0" not in encoder.calls


def test_another_model_gets_instructions_on_request(
    encoder: Any, data: Path, records: list[Record]
) -> None:
    (task,) = held_out_tasks(data, instructed=True)
    scores = score_task(encoder, task)
    expected = scores_by_hand(encoder, records, instructed=True)
    assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=2e-5)
    assert expected != scores_by_hand(encoder, records)
    assert "Find: question 0" in encoder.calls
    assert "question 0" not in encoder.calls


def test_our_own_ranking_is_mtebs(
    encoder: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of vectors with few values, so that most scores tie, and of ordinary ones."""
    drawn = encoder.vector
    for vector in (drawn, lambda text: np.sign(drawn(text)[:4])):
        monkeypatch.setattr(encoder, "vector", vector)
        task = held_out_tasks(data)[0]
        scores = score_task(encoder, task)
        queries, passages = (
            np.stack([vector(bare(text)) for text in part.values()])
            for part in (task.judged.queries, task.judged.documents)
        )
        found = rank_scores(queries, passages, task.judged)
        assert found == pytest.approx({k: scores[k] for k in found}, abs=6e-6)
    turned = rank_scores(queries[::-1], passages, task.judged)
    assert turned != pytest.approx(found, abs=1e-3)


def test_fewer_documents_keep_the_right_ones(data: Path, records: list[Record]) -> None:
    records.append(Record("mate", "made-up", "another question", ["third use"], group="it"))
    judged = held_out_tasks(data)[0].judged
    judged = judged.select(["use0", "q4"])
    few = judged.limit_documents(5, seed=1)
    assert len(few.documents) == 5
    assert few.documents.items() <= judged.documents.items()
    assert few == judged.limit_documents(5, seed=1) != judged.limit_documents(5, seed=2)
    own, mates = few.document_indices()
    texts = list(few.documents.values())
    assert {texts[i] for i in own[0]} == {"one use", "another use"}
    assert {texts[i] for i in own[1]} == {"answer 4", "second answer 4"}
    assert set(own[0]) <= set(mates[0])
    assert len(judged.limit_documents(1, seed=0).documents) == 4
    assert judged.limit_documents(10_000, seed=0) is judged


def test_the_vectors_of_the_search_are_measured(
    encoder: Any, data: Path, records: list[Record]
) -> None:
    """The separation ratio from its definition, text by text; each text is encoded once."""
    records.append(Record("mate", "made-up", "another question", ["third use"], group="it"))
    scores = score_task(encoder, held_out_tasks(data)[0])
    assert len(encoder.calls) == len(set(encoder.calls))
    corpus = sorted({t for r in records for t in (*r.positives, *r.negatives)})
    uses = {"one use", "another use"}
    near, far = [], []
    for record in records:
        query = encoder.vector(record.query)
        distance = {text: 1 - query @ encoder.vector(text) for text in corpus}
        own = uses if record.id.startswith("use") else set(record.positives)
        mates = uses | {"third use"} if record.group == "it" else set()
        near.append(np.mean([distance[t] for t in own]))
        far.append(np.mean([d for t, d in distance.items() if t not in own | mates]))
    expected = np.mean(far) / np.mean(near)
    assert scores["separation_ratio"] == pytest.approx(expected, abs=2e-5)
    assert 1 < scores["effective_rank"] < 16
    assert "encode" not in vars(encoder)


def test_texts_that_repeat_are_one_document(data: Path) -> None:
    judged = held_out_tasks(data)[0].judged
    assert len(set(judged.documents.values())) == len(judged.documents)
    assert judged.relevant["use0"] == judged.relevant["use1"]
    assert len(judged.relevant["use0"]) == 2
    assert len(judged.relevant["q1"]) == 1


def test_one_id_in_two_corpora_stays_two_queries(data: Path, records: list[Record]) -> None:
    records.append(Record(id="q1", source="other", query="else", positives=["something else"]))
    judged = held_out_tasks(data)[0].judged
    assert judged.queries["q1"] == "question 1"
    assert judged.queries["q1#2"] == "else"


def test_a_sample_of_queries_keeps_the_corpus(data: Path) -> None:
    whole, some = held_out_tasks(data)[0], held_out_tasks(data, max_queries=7, seed=1)[0]
    assert len(some.judged.queries) == 7
    assert some.judged.documents == whole.judged.documents
    assert list(some.judged.queries) == whole.judged.sample(7, 1) != whole.judged.sample(7, 2)


def test_real_shards(tmp_path: Path, records: list[Record]) -> None:
    files = write_split(tmp_path, "eval", records, seed=0, records_per_shard=16)
    Manifest(tmp_path, {"eval": files}, [], 0, "made", "test").save()
    judged = held_out_tasks(tmp_path)[0].judged
    assert set(judged.queries) == {record.id for record in records}


def test_wrong_data_is_one_line(data: Path, records: list[Record]) -> None:
    with pytest.raises(DataError, match="lbr-ds prepare"):
        held_out_tasks(data / "missing")
    records.clear()
    with pytest.raises(DataError, match="no query"):
        held_out_tasks(data)[0]


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("ChemTEB", "ChemNQRetrieval"),
        ("MTEB(Medical, v1)", "NFCorpus"),
        ("CoIR", "CosQA"),
        ("RTEB(fin, beta)", "FinQARetrieval"),
        ("NFCorpus", "NFCorpus"),
    ],
)
def test_names_resolve_without_a_network(name: str, member: str) -> None:
    assert member in [task.metadata.name for task in official_tasks([name])]


def test_a_task_named_twice_comes_once() -> None:
    names = [task.metadata.name for task in official_tasks(["CoIR", "CosQA", "CoIR"])]
    assert len(names) == len(set(names)) == 10


@pytest.mark.parametrize(
    ("name", "near"),
    [("NFCorpsu", "NFCorpus"), ("chemteb", "ChemTEB"), ("FinQA", "FinQARetrieval")],
)
def test_unknown_names_get_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown task '{name}'; nearest: .*\b{near}\b"):
        official_tasks([name])


def test_commas_inside_a_benchmarks_name() -> None:
    assert split_names("CoIR, MTEB(Medical, v1),NFCorpus,") == [
        "CoIR",
        "MTEB(Medical, v1)",
        "NFCorpus",
    ]


def test_eval_split_behind_a_url(
    tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LBR_DS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    shards = write_split(folder, "eval", records, seed=0, records_per_shard=9)
    Manifest(folder, {"eval": shards}, [], 0, "print", "test").save()
    far, near = held_out_tasks(f"file://{folder}/")[0], held_out_tasks(folder)[0]
    assert far.judged == near.judged
    assert far.metadata.name == near.metadata.name == "corpus-eval"
    with pytest.raises(DataError, match=r"file:///nowhere holds no manifest.json"):
        held_out_tasks("file:///nowhere")[0]


def test_scores_of_each_source_are_means_over_its_queries(
    encoder: Any, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [replace(r, source=f"part {n % 3}") for n, r in enumerate(records)]
    folder = tmp_path / "several"
    files = write_split(folder, "eval", named, seed=0, records_per_shard=16)
    Manifest(folder, {"eval": files}, [], 0, "print", "test").save()
    (task,) = held_out_tasks(folder)
    scores = score_task(encoder, task)
    assert list(scores["by_source"]) == ["part 0", "part 1", "part 2"]
    source = {r.id: r.source for r in named}
    for key in ("recall_at_10", "ndcg_at_10"):
        parts = scores["by_source"].values()
        together = sum(part[key] * part["queries"] for part in parts) / len(named)
        assert together == pytest.approx(scores[key], abs=2e-5)
        assert len({part[key] for part in parts}) > 1
    for name, part in scores["by_source"].items():
        own = [value for query, value in task.per_query.items() if source[query] == name]
        assert part["queries"] == len(own)
        assert part["ndcg_at_10"] == pytest.approx(np.mean(own), abs=1e-5)
    monkeypatch.setattr("lbr_ds.shards.sources.MAX_TRACKED", 2)
    assert {name: part["queries"] for name, part in task.by_source().items()} == {
        "part 0": 14,
        "others": 26,
    }
