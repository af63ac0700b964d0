"""Held-out and control queries over one corpus, against a computation by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.config import load
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import DataError
from lbr_ds.evaluation import evaluate, held_out_tasks
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.records import Record
from lbr_ds.shards import read_split, write_split
from tests.corpora.test_knowledge import asked, recipe
from tests.tiny import edit_manifest, tiny_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data by the knowledge split; facts are the pairs themselves."""
    raws = [asked(n, k) for n in range(40) for k in (0, 1)]
    told = [{**raw, "id": f"f-{raw['id']}"} for raw in raws]
    data = recipe(tmp_path, {"fact": told, "pair": raws})
    prepare(data, 0)
    return data.local_folder


def by_hand(encoder: Any, records: list[Record], corpus: list[str]) -> dict[str, float]:
    vectors = np.stack([encoder.vector(text) for text in corpus])
    hits, gains = [], []
    for record in records:
        order = np.argsort(-vectors @ encoder.vector(record.query))
        rank = [corpus[i] for i in order].index(record.positives[0])
        hits.append(float(rank < 10))
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
    return {"recall_at_10": float(np.mean(hits)), "ndcg_at_10": float(np.mean(gains))}


def test_two_tasks_over_one_corpus(
    encoder: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {name: list(read_split(folder, name)) for name in ("cl", "eval", "control")}
    corpus = sorted({r.positives[0] for records in splits.values() for r in records})
    assert len(corpus) == 40  # an entity's pairs have one passage
    monkeypatch.setattr("lbr_ds.evaluation.evaluation.load_model", lambda *args, **kwargs: encoder)
    result = evaluate("any", data=folder)
    assert result["protocol"] == "knowledge split"
    assert list(result["tasks"]) == list(result["per_query"]) == ["data-eval", "data-control"]
    for name in ("eval", "control"):
        scores = result["tasks"][f"data-{name}"]
        expected = by_hand(encoder, splits[name], corpus)
        assert 0 < expected["ndcg_at_10"] < 1
        assert {k: scores[k] for k in expected} == pytest.approx(expected, abs=2e-5)
        assert (scores["queries"], scores["documents"]) == (len(splits[name]), 40)
        assert scores["separation_ratio"] > 0
        assert set(result["per_query"][f"data-{name}"]) == {r.id for r in splits[name]}
    assert len(encoder.calls) == len(set(encoder.calls))  # the corpus once for both


def test_a_sample_of_each(folder: Path) -> None:
    tasks = held_out_tasks(folder, max_queries=5, seed=2)
    assert [len(task.judged.queries) for task in tasks] == [5, 5]
    assert tasks[0].judged.documents is tasks[1].judged.documents


def test_a_model_of_the_same_data_is_scored(folder: Path, tmp_path: Path) -> None:
    """gl has told eval's own words; a model of other data with them is refused, as ever."""
    run = load(tiny_recipe(tmp_path / "tiny", prepared=False))
    model = tmp_path / "model"
    prepare_backbone(run.model, run.bottleneck, model, 0)
    trained_texts.save(trained_texts.of_data(folder), model)
    result = evaluate(str(model), data=folder)
    assert "overlap" not in result
    assert len(result["tasks"]) == 2
    # The same texts under another fingerprint: nothing is known of what was told on purpose.
    other = tmp_path / "data2"
    shutil.copytree(folder, other)
    path = other / "manifest.json"
    edit_manifest(other, lambda raw: raw.update(fingerprint="f" * 16))
    with pytest.raises(DataError, match="trained on texts of data2-eval: 16 of 16 queries"):
        evaluate(str(model), data=other)
    # Nor may the control be known.
    control = list(read_split(folder, "control"))
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.rmtree(other / "control")
    shards = write_split(
        other, "control", list(read_split(folder, "cl"))[:3], seed=0, records_per_shard=64
    )
    listed = {"records": 3, "shards": [vars(shard) for shard in shards]}
    path.write_text(json.dumps(manifest))
    edit_manifest(other, lambda raw: raw["splits"].update(control=listed))
    with pytest.raises(DataError, match="trained on texts of data2-control: 3 of 3 queries"):
        evaluate(str(model), data=other)
    assert len(control) == 16
