"""Answers with a cache are those of plain greedy decoding; from B alone they cannot see X."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lbr_ds.batching import Sequence, pack
from lbr_ds.cli import app
from lbr_ds.config import load
from lbr_ds.errors import ConfigError
from lbr_ds.evaluation import EvalOptions, evaluate
from lbr_ds.evaluation.generation import contexts, score_generation
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.text_metrics import bleu_4, rouge_l
from lbr_ds.model import generate
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from tests.tiny import records, tiny_recipe

LIMIT = 12
QUERIES = [r["query"] + " again" * (n % 4) for n, r in enumerate(records(11))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe's folder, its data prepared, its backbone with bottleneck in run/backbone."""
    run = load(tiny_recipe(tmp_path_factory.mktemp("write")))
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", 0)
    return run.run.parent


@pytest.fixture(scope="module", params=[True, False], ids=["bottleneck", "visible"])
def cut(request: pytest.FixtureRequest) -> bool:
    """What the answers see."""
    return bool(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> PackedEncoder:
    """With larger weights, so that the states of a random model differ and so do its words."""
    encoder = PackedEncoder(folder / "run" / "backbone", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "head" not in name:
                parameter *= 12
    return encoder


@torch.no_grad()
def plain(model: PackedEncoder, context: Sequence) -> list[int]:
    """Greedy, the whole sequence through the trainer's packed forward again for each token."""
    written: list[int] = []
    while len(written) < LIMIT:
        # The last target's own row is only read in the next round, so a filler stands there.
        full = Sequence(context.context, context.num_bottleneck, [*written, 0], cut=context.cut)
        batch = pack([full])
        hidden = model.model.backbone.base_model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            segments=batch.segments,
        ).last_hidden_state[0]
        best = int((hidden[batch.read[-1]] @ model.model.head.weight.T).argmax())
        if best == model.tokenizer.backend.eos_token_id:
            break
        written.append(best)
    return written


def test_cached_is_plain_greedy(model: PackedEncoder, cut: bool) -> None:
    prompts = contexts(model, QUERIES, cut=cut)
    expected = [plain(model, prompt) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 3
    assert generate.write(model, prompts, LIMIT) == expected
    assert generate.write(model, prompts, LIMIT, batch_tokens=100) == expected  # other company
    assert generate.write(model, prompts[3:4], LIMIT) == expected[3:4]


def test_x_is_known_through_the_bottleneck_alone(
    model: PackedEncoder, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once B's states stand, X's keys and values are spoiled: what saw them would say so."""
    prompts = contexts(model, QUERIES, cut=cut)
    expected = generate.write(model, prompts, LIMIT)
    base, keep = model.model.backbone.base_model, model.card.num_bottleneck
    forward = base.forward

    def spoiling(**given: Any) -> Any:
        out = forward(**given)
        if "segments" in given:
            ends = given["segments"].starts[1:]
            b_rows = {int(end) - 1 - n for end in ends for n in range(keep)}
            x_rows = [n for n in range(int(ends[-1])) if n not in b_rows]
            for layer in given["past_key_values"].layers:
                for states in (layer.keys, layer.values):
                    states[:, :, x_rows] = float("nan")
        return out

    monkeypatch.setattr(base, "forward", spoiling)
    assert (generate.write(model, prompts, LIMIT) == expected) is cut


def test_only_b_is_cached_of_a_cut_sequence(model: PackedEncoder) -> None:
    last, cache, visible = generate._read(model, contexts(model, QUERIES, cut=True))
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.shape[2] == visible.shape[1] == model.card.num_bottleneck
    assert bool(visible.all())
    assert len(last) == len(QUERIES)


def test_an_answer_ends_at_the_end_token(model: PackedEncoder) -> None:
    prompts = contexts(model, QUERIES, cut=False)
    ids = next(i for i in generate.write(model, prompts, LIMIT) if len(set(i)) > 1)
    tokenizer, before = model.tokenizer.backend, model.tokenizer.backend.eos_token
    stop = next(n for n, i in enumerate(ids) if i not in ids[:n] and n > 0)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[stop])
    try:
        assert ids[:stop] in generate.write(model, prompts, LIMIT)
    finally:
        tokenizer.eos_token = before


def test_scores_of_texts() -> None:
    texts = ["the liver is inflamed and sore", "a stone in the kidney", "fever"]
    assert bleu_4(texts, [[t] for t in texts]) == pytest.approx(100)
    assert rouge_l(texts, [[t] for t in texts]) == [100] * 3
    # A second reference may only help, and need not be there for every text.
    some = [["nothing alike here", texts[0]], [texts[1]], ["fever"]]
    assert bleu_4(texts, some) == pytest.approx(100)
    assert rouge_l(texts, some) == [100] * 3
    # Longest common subsequence "a stone kidney": 3 of 5 words and 3 of 3.
    assert rouge_l(["a stone in the kidney"], [["a stone kidney"]]) == [75]


def test_what_cannot_be_scored_is_left_out_and_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relevant = {"a": {"d0": 1}, "b": {"d1": 1}}
    queries, documents = {"a": QUERIES[0], "b": QUERIES[1]}, {"d0": "...", "d1": "fever"}
    judged = Judgements(queries, documents, relevant, relevant)
    found = score_generation(folder / "run" / "backbone", judged)
    assert (found["queries"], found["unscored"]) == (2, 1)
    for prompt, scores in found["per_query"].items():
        assert scores["a"] is None
        assert found["prompts"][prompt]["rouge_l"] == scores["b"]
    assert "1 of 2 queries are not scored: no reference" in caplog.text


def test_by_the_command_line(folder: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out.json", folder / "run"
    command = [
        "eval",
        str(run),
        "--data",
        str(folder / "data"),
        "--out",
        str(out),
        "--generation",
        "--max-queries",
        "6",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["generation"]
    assert (found["queries"], found["unscored"]) == (6, 0)
    assert set(found["prompts"]) == {"visible", "bottleneck"}
    for prompt, scores in found["prompts"].items():
        assert 0 <= scores["bleu_4"] <= 100
        assert 0 <= scores["chrf"] <= 100
        own = list(found["per_query"][prompt].values())
        assert scores["rouge_l"] == pytest.approx(sum(own) / 6, abs=1e-3)
    with pytest.raises(ConfigError, match="--generation, --states and --bottleneck need a run"):
        evaluate("bm25", data=folder / "data", options=EvalOptions(generation=True))


def test_without_a_bottleneck_there_is_one_prompt(folder: Path) -> None:
    run = load(folder / "recipe.yaml", ["bottleneck.count=0", "stage1.objective=plain_sft"])
    prepare_backbone(run.model, run.bottleneck, folder / "plain" / "backbone", 0)
    found = evaluate(
        str(folder / "plain"),
        data=folder / "data",
        options=EvalOptions(generation=True, max_queries=3),
    )
    assert set(found["generation"]["prompts"]) == {"visible"}
