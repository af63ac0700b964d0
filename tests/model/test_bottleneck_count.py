"""The first k of K bottleneck tokens are a model with k tokens; a ratio gives each text its k."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from lbr_ds.batching import TextTokenizer
from lbr_ds.config import BottleneckConfig, RunConfig, load
from lbr_ds.encoder import Encoder
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.exporting import TOLERANCE, export
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from lbr_ds.report.compare import compare
from tests.tiny import records, tiny_recipe

TEXTS = ["", "a", *(r["query"] for r in records(5)), "acute pain in the liver " * 30]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with prepared data; no model is trained in this file."""
    return tiny_recipe(tmp_path_factory.mktemp("count"), count=60)


def made(recipe: Path, *overrides: str) -> tuple[RunConfig, Path]:
    """A run and its prepared backbone."""
    name = "-".join(overrides).replace("bottleneck.", "")
    run = load(recipe, [f"run={recipe.parent / name}", *overrides])
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", 0)
    return run, run.run / "backbone"


def tokenizer_of(run: RunConfig, ratio: float | None = None) -> TextTokenizer:
    return TextTokenizer(
        load_tokenizer(run.run / "backbone"),
        max_length=run.model.max_length,
        num_bottleneck=run.bottleneck.count,
        ratio=ratio,
    )


@pytest.mark.parametrize("count", [1, 3])
def test_read_and_exported_with_fewer_tokens(recipe: Path, tmp_path: Path, count: int) -> None:
    """The vectors of a model with so many tokens, of the same weights, also by stock tools."""
    _, whole = made(recipe, "bottleneck.count=4")
    _, fixed = made(recipe, f"bottleneck.count={count}")
    weights = load_file(whole / "model.safetensors")
    (fixed / "files.json").unlink()
    save_file(weights, fixed / "model.safetensors", metadata={"format": "pt"})
    wanted = PackedEncoder(fixed).encode(TEXTS)
    found = Encoder(whole, bottleneck=count).encode_queries(TEXTS)
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(wanted - PackedEncoder(whole).encode(TEXTS)).max() > 1e-3
    proof = export(whole, tmp_path / "out", bottleneck=count)
    assert proof["largest_difference"] <= TOLERANCE
    stock = Encoder(tmp_path / "out").encode_queries(TEXTS)
    np.testing.assert_allclose(stock, wanted, atol=TOLERANCE)
    assert json.loads((tmp_path / "out" / "lbr.json").read_text())["num_bottleneck"] == count
    with pytest.raises(ConfigError, match=r"has a fixed number of tokens"):
        Encoder(tmp_path / "out", bottleneck=1)


def test_scores_by_number_are_those_of_models_with_so_many(recipe: Path) -> None:
    run, whole = made(recipe, "bottleneck.count=4", "seed=1")
    _, fixed = made(recipe, "bottleneck.count=2", "seed=1")
    (fixed / "files.json").unlink()
    weights = load_file(whole / "model.safetensors")
    save_file(weights, fixed / "model.safetensors", metadata={"format": "pt"})
    data = run.data.folder
    found = evaluate(str(whole), data=data, options=EvalOptions(bottleneck=(4, 2)))
    scores = [evaluate(str(f), data=data)["tasks"]["data-eval"] for f in (fixed, whole)]
    wanted = [
        {"bottleneck": k, **{m: s[m] for m in ("recall_at_10", "ndcg_at_10")}}
        for k, s in zip((2, 4), scores, strict=True)
    ]
    assert found["bottleneck"] == [pytest.approx(row, abs=1e-5) for row in wanted]
    assert found["tasks"]["data-eval"]["ndcg_at_10"] == scores[1]["ndcg_at_10"]
    (table,) = compare({"stage1": found})
    assert table["by_bottleneck"] == found["bottleneck"]


def test_a_ratio_of_equal_lengths_is_a_fixed_number(recipe: Path) -> None:
    run, _ = made(recipe, "bottleneck.count=8")
    whole = tokenizer_of(run)
    for ratio in (1, 2.5, 4, 100):
        own = tokenizer_of(run, ratio)
        for text in TEXTS:
            n = min(len(whole.plain(text, 999)), own.max_length)
            k = min(8, max(1, math.ceil(n / ratio)))
            (found,), (wanted,) = own.embed([text]), whole.at(k).embed([text])
            assert found == wanted
            assert len(found.context) <= own.max_length
            rehearsed = own.wrap(whole.plain(text, 999))
            assert rehearsed[-k:] == wanted.context[-k:]
    assert len({s.num_bottleneck for s in tokenizer_of(run, 4).embed(TEXTS)}) > 2


def test_a_ratio_model_is_read_by_ours_and_exported_with_a_fixed_number(
    recipe: Path, tmp_path: Path
) -> None:
    _, folder = made(recipe, "bottleneck.count=8", "bottleneck.ratio=3")
    encoder = Encoder(folder)
    found = encoder.encode_documents(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        k = encoder.packed_model.tokenizer.embed([text])[0].num_bottleneck
        alone = Encoder(folder, bottleneck=k).encode_documents([text])[0]
        np.testing.assert_allclose(vector, alone, atol=1e-6)
    with pytest.raises(ConfigError, match=r"export a fixed number with --bottleneck \(1 to 8\)"):
        export(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--bottleneck 9: .* has 8 bottleneck tokens"):
        export(folder, tmp_path / "out", bottleneck=9)
    export(folder, tmp_path / "out", bottleneck=8)
    assert json.loads((tmp_path / "out" / "lbr.json").read_text())["ratio"] is None


def test_numbers_that_cannot_be(recipe: Path) -> None:
    with pytest.raises(ValidationError, match="ratio needs bottleneck tokens"):
        BottleneckConfig.model_validate({"count": 0, "ratio": 4})
    run, _ = made(recipe, "bottleneck.count=4")
    with pytest.raises(ConfigError, match="5 bottleneck tokens: the model has 4; give a number"):
        tokenizer_of(run).at(5)
