"""Scores of merged models are resumed, and never mixed with those of other models or data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbr_ds import trade as trading
from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation import EvalOptions
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.shards import Manifest
from lbr_ds.trade import trade
from tests.mining.toy import file_bytes
from tests.tiny import backbone

WEIGHTS = (0, 0.25, 0.5, 1)


class Stopped(BaseException):
    """What ends the program in the middle of its work."""


class Steps:
    """The merges and scorings of a call, of which one may be interrupted at its end."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stop_at = 0

    def wrap(self, act: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """Return `act`, with a record of what it was called for."""

        def step(*args: Any, **options: Any) -> Any:
            found = act(*args, **options)
            self.done.append(name(*args))
            if len(self.done) == self.stop_at:
                raise Stopped
            return found

        return step


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Real merges; `evaluate`, which test_merging.py compares, is replaced by numbers."""

    def score(model: str, *, data: Path, general: Path, options: EvalOptions) -> dict[str, Any]:
        value = len(Path(model).name) / 7
        tasks = {f"{Path(place).name}-eval": {"ndcg_at_10": value} for place in (data, general)}
        facts = {"data": str(data), "general": str(general), "environment": {"device": "cpu"}}
        return {"tasks": tasks, "max_queries": options.max_queries, **facts}

    found = Steps()
    merge = found.wrap(trading.merge, lambda models, out: f"merge {out.name}")
    monkeypatch.setattr(trading, "merge", merge)
    scored = found.wrap(score, lambda model: f"score {Path(model).name}")
    monkeypatch.setattr(trading, "evaluate", scored)
    return found


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    """Arguments of `trade`: two backbones with different bottlenecks, and manifests."""
    model = ModelConfig(backbone=str(backbone(tmp_path / "raw")), max_length=32)
    for seed, name in enumerate(("model", "backbone")):
        prepare_backbone(model, BottleneckConfig(count=2), tmp_path / name, seed)
    for name in ("data", "general"):
        (tmp_path / name).mkdir()
        Manifest(tmp_path / name, {}, [], 0, name, "test").save()
    places = {name: tmp_path / name for name in ("out", "data", "general")}
    return {"models": [tmp_path / "model", tmp_path / "backbone"], **places}


def test_an_interrupted_call_resumes_after_each_step(asked: dict[str, Any], steps: Steps) -> None:
    """With the same files, and without scoring again what was stored."""
    rows, out = trade(**asked, weights=WEIGHTS), asked["out"]
    whole, order = file_bytes(out), list(steps.done)
    assert order == [
        *("merge weight-0.25", "merge weight-0.5"),
        *("score backbone", "score weight-0.25", "score weight-0.5", "score model"),
    ]
    for stop in range(1, len(order) + 1):
        shutil.rmtree(out)
        steps.done, steps.stop_at = [], stop
        with pytest.raises(Stopped):
            trade(**asked, weights=WEIGHTS)
        assert steps.done == order[:stop]
        steps.done, steps.stop_at = [], 0
        assert trade(**asked, weights=WEIGHTS) == rows
        scores = [step for step in steps.done if step.startswith("score")]
        assert scores == order[max(stop - 1, 2) :]  # the scores of the last step were not stored
        assert file_bytes(out) == whole
    steps.done = []
    assert trade(**asked, weights=WEIGHTS) == rows
    assert steps.done == []


def test_rows_of_other_weights_stay(asked: dict[str, Any], steps: Steps) -> None:
    first = trade(**asked, weights=(0.5,))
    steps.done = []
    second = trade(**asked, weights=(0.25,))
    assert steps.done == ["merge weight-0.25", "score weight-0.25"]
    stored = json.loads((asked["out"] / trading.NAME).read_text())["rows"]
    assert stored == [*second, *first]


def test_other_data_and_options_are_scored_again(asked: dict[str, Any], steps: Steps) -> None:
    trade(**asked, weights=(0.5,))
    options = EvalOptions(max_queries=3)
    steps.done = []
    trade(**asked, weights=(0.5,), options=options)
    replace(Manifest.load(asked["general"]), fingerprint="changed").save()
    trade(**asked, weights=(0.5,), options=options)
    trade(**asked, weights=(0.5,), options=options)
    assert steps.done == ["merge weight-0.5", "score weight-0.5"] * 2  # the merge is found made
    found = json.loads((asked["out"] / trading.NAME).read_text())
    assert found["max_queries"] == 3


@pytest.mark.parametrize("change", [{"method": "slerp"}, {"models": ()}])
def test_models_that_were_merged_otherwise_are_kept(
    asked: dict[str, Any], steps: Steps, change: dict[str, Any]
) -> None:
    trade(**asked, weights=WEIGHTS)
    before = file_bytes(asked["out"])
    steps.done = []
    other = {**asked, **change}
    other["models"] = other["models"] or asked["models"][::-1]
    with pytest.raises(ConfigError, match=r"weight-0.25 exists and was not merged from these"):
        trade(**other, weights=WEIGHTS)
    assert steps.done == []
    assert file_bytes(asked["out"]) == before
