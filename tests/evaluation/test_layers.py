"""States by layer are the plain backbone's, text by text; the last layer's are what is scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lbr_ds.config import load
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.evaluation.layers import states
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from tests.tiny import records, tiny_recipe


@pytest.fixture(scope="module", params=[3, 0], ids=["bottleneck", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe's folder with its data and a backbone of K tokens."""
    keys = {"bottleneck__count": request.param}
    more = {} if request.param else {"stage1__objective": "plain_sft"}
    run = load(tiny_recipe(tmp_path_factory.mktemp("states"), **keys, **more))
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", 0)
    return run.run.parent


def test_states_are_those_of_the_plain_backbone(folder: Path) -> None:
    """One text at a time, the model code untouched: each layer, each reading."""
    model = PackedEncoder(folder / "run" / "backbone", device="cpu", dtype=torch.float32)
    own = model.card.num_bottleneck
    texts = [r["query"] + " more" * (n % 3) for n, r in enumerate(records(7))]
    found = states(model, texts)
    backbone = AutoModelForCausalLM.from_pretrained(folder / "run" / "backbone", dtype="float32")
    wanted: dict[str, list[torch.Tensor]] = {read: [] for read in found}
    assert set(wanted) == ({"last", "bottleneck", "mean"} if own else {"last", "mean"})
    starts = {"last": -1, "bottleneck": -own, "mean": 0}
    for text in texts:
        ids = torch.tensor([model.tokenizer.contexts([text])[0]])
        with torch.no_grad():
            layers = torch.cat(backbone(ids, output_hidden_states=True).hidden_states)
        for read, rows in wanted.items():
            rows.append(layers[:, starts[read] :].mean(1))
    for read, rows in wanted.items():
        plain = torch.nn.functional.normalize(torch.stack(rows, 1), dim=-1)
        np.testing.assert_allclose(found[read], plain, atol=1e-3)  # kept in half precision


def test_the_last_layer_is_what_eval_scores(folder: Path) -> None:
    result = evaluate(
        str(folder / "run" / "backbone"), data=folder / "data", options=EvalOptions(states=True)
    )
    (scores,) = result["tasks"].values()
    layers = max(row["layer"] for row in result["states"])
    (last,) = (r for r in result["states"] if (r["layer"], r["read"]) == (layers, "last"))
    for key in ("recall_at_10", "ndcg_at_10", "separation_ratio"):
        assert last[key] == pytest.approx(scores[key], abs=2e-3)
