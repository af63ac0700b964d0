"""The model card: front matter that a hub reads, and scores that `eval` writes into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lbr_ds.errors import ConfigError
from lbr_ds.exporting.card import add_scores, model_card
from lbr_ds.lineage import Bottleneck, Dataset, Lineage, Source, Training
from lbr_ds.model.bottleneck import Card

RECIPE = """
name: made-up
run: {run}
model: {{backbone: owner/backbone}}
data: {{folder: {data}, languages: [en, de]}}
stage1: {{num_steps: 1, samples_per_step: 8, optim: {{lr: 1.0e-3}}}}
stage2: {{num_steps: 1, samples_per_step: 8, optim: {{lr: 1.0e-3}}}}
card: {{license: apache-2.0, intended_use: Search in made-up texts.}}
"""
DATA = Dataset(
    name="data",
    place="data",
    fingerprint="0" * 16,
    protocol="random",
    splits={"gl": 61, "cl": 30, "eval": 12},
    leaks={"eval_gl": 0, "eval_cl": 0},
    sources=(Source(name="a", path="hf:owner/pairs", license="MIT"), Source(name="b")),
)
PARITY = {"texts": ["a"] * 12, "vectors": [], "largest_difference": 2e-7, "limit": 1e-5}
SCORES = {"recall_at_10": 0.7, "ndcg_at_10": 0.54321, "queries": 400, "documents": 725}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder, as far as its card goes."""
    run, data, model = tmp_path / "run", tmp_path / "data", tmp_path / "model"
    for made in (run / "eval", run / "stage2", data, model):
        made.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE.format(run=run, data=data))
    (run / "eval" / "base.json").write_text(json.dumps({"tasks": {"held-out": SCORES}}))
    Lineage(
        backbones=(),
        bottleneck=Bottleneck(count=4, attention="causal", pooling="last", max_length=64),
        history=(Training(stage=1, split="gl", steps=1, samples=8, data=DATA),),
    ).save(model)
    shape = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
    (model / "config.json").write_text(json.dumps({**shape, "architectures": ["LlamaModel"]}))
    card = Card(num_bottleneck=4, max_length=64, pooling="last", attention="causal")
    (model / "README.md").write_text(model_card(run, model, card, PARITY))
    return model


def front_matter(folder: Path) -> dict[str, Any]:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_the_front_matter_follows_from_the_run(folder: Path) -> None:
    data = front_matter(folder)
    assert data["base_model"] == "owner/backbone"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "de"]
    assert data["datasets"] == ["owner/pairs"]
    assert data["pipeline_tag"] == "sentence-similarity"
    assert "Search in made-up texts." in (folder / "README.md").read_text()
    assert "model-index" not in data


def test_scores_are_written_and_replaced(folder: Path) -> None:
    add_scores(folder, {"tasks": {"held-out": SCORES, "NFCorpus": {**SCORES, "ndcg_at_10": 0.2}}})
    add_scores(folder, {"tasks": {"held-out": {**SCORES, "ndcg_at_10": 0.6}}})
    card = ModelCard.load(folder / "README.md")
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert values == {
        ("held-out", "ndcg_at_10"): 60.0,
        ("held-out", "recall_at_10"): 70.0,
        ("NFCorpus", "ndcg_at_10"): 20.0,
        ("NFCorpus", "recall_at_10"): 70.0,
    }
    assert "| held-out | 60.00 | 70.00 | 400 | 725 |" in card.text
    assert "| base | held-out | 54.32 | 70.00 | 400 | 725 |" in card.text
    assert "Not scored yet" not in card.text
    assert card.data.base_model == "owner/backbone"


def test_another_readme_is_left_alone(folder: Path) -> None:
    (folder / "README.md").write_text("# My own notes\n")
    add_scores(folder, {"tasks": {"held-out": SCORES}})
    assert (folder / "README.md").read_text() == "# My own notes\n"


def test_front_matter_that_was_edited_badly_is_named(folder: Path) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text().replace("license: apache-2.0", "license: [apache", 1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"README.md: the front matter cannot be read"):
        add_scores(folder, {"tasks": {"held-out": SCORES}})
    assert path.read_bytes() == before
