"""Several sources in training: losses by source, temperatures, homogeneous steps, exact resume.

Oracle: the step in plain torch, every text alone. One rank and two, on real ZeRO-3 processes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lbr_ds.batching import TextTokenizer
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.runs import checkpoints
from lbr_ds.shards import Manifest, Sample, steps
from lbr_ds.shards.mixture import mixture_of
from lbr_ds.training.by_source import check_sources
from tests.dense import dense_mask
from tests.ranks import run_ranks
from tests.tiny import records, tiny_recipe
from tests.training.test_resume import metrics

pytestmark = pytest.mark.slow

WORLDS = (1, 2)
TOLERANCE = 1e-5
TEMPERATURES = {"one": 0.05, "two": 0.2}  # the first is the recipe's


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("mixed")
    corpus = {"one": records(150), "two": records(90, seed=1)}
    for name, rows in corpus.items():
        named = [{**r, "id": f"{name}-{r['id']}", "source": name} for r in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in named))
    sources = [
        {"path": str(folder / "one.jsonl"), "name": "one"},
        {"path": str(folder / "two.jsonl"), "name": "two", "weight": 2, "temperature": 0.2},
    ]
    run = load(tiny_recipe(folder, prepared=False, data__sources=sources))
    prepare(run.data, run.seed)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    (run.run / "recipe.yaml").write_text(run.dump())
    for world in WORLDS:
        run_ranks("tests.training.mixed", world, str(run.run / "recipe.yaml"), str(run.run))
    return run


def probed(run: RunConfig, case: str, world: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run.run / f"{case}-{world}.pt")
    return found


def samples(run: RunConfig, number: int) -> list[Sample]:
    stream = steps(
        run.data.folder,
        {1: "gl", 2: "cl"}[number],
        seed=run.seed,
        samples_per_step=8,
        rank=0,
        world=1,
        stop=1,
        mixing=run.mixing(number),
    )
    found = next(iter(stream)).samples
    assert {sample.record.source for sample in found} == {"one", "two"}
    return found


def plain(run: RunConfig) -> tuple[Any, TextTokenizer]:
    model = AutoModelForCausalLM.from_pretrained(run.run / "backbone", attn_implementation="sdpa")
    return model, TextTokenizer(
        load_tokenizer(run.run / "backbone"),
        max_length=run.model.max_length,
        num_bottleneck=run.bottleneck.count,
    )


def distance(found: dict[str, Tensor], model: Any) -> float:
    """Relative error of the gradients over all parameters together."""
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    difference = sum((found[n] - w).double().square().sum() for n, w in wanted.items())
    return float((difference / sum(w.double().square().sum() for w in wanted.values())).sqrt())


@pytest.mark.parametrize("world", WORLDS)
def test_stage_1_loss_by_source(run: RunConfig, world: int) -> None:
    model, tokenizer = plain(run)
    sums, counts = dict.fromkeys(TEMPERATURES, 0.0), dict.fromkeys(TEMPERATURES, 0)
    for sample in samples(run, 1):
        record = sample.record
        seq = generative_sequence(record, "ib_sft", tokenizer, turn=0, max_target_length=32)
        ids = torch.tensor([seq.context + seq.target])
        logits = model(ids, attention_mask=dense_mask([seq])[None, None]).logits[0]
        rows = logits[len(seq.context) - 1 : -1]
        targets = torch.tensor(seq.target)
        sums[record.source] += torch.nn.functional.cross_entropy(
            rows, targets, reduction="sum"
        ).item()
        counts[record.source] += len(seq.target)
    stats = probed(run, "gl", world)["stats"]
    assert probed(run, "gl", world)["micro_batches"] > 1
    for name, total in sums.items():
        assert stats[f"loss/{name}"] == pytest.approx(total / counts[name], rel=TOLERANCE)
    together = sum(stats[f"loss/{name}"] * counts[name] for name in sums)
    assert together / stats["target_tokens"] == pytest.approx(stats["loss"], rel=TOLERANCE)
    assert stats["bag_loss"] > 0


def losses_of(vectors: Tensor, found: list[Sample], size: int) -> Tensor:
    """(8,) InfoNCE of each query over positives and negatives; no two texts are of one group."""
    short = torch.nn.functional.normalize(vectors[:, :size], dim=-1)
    queries, candidates = short[:8], short[8:]
    assert len({s.record.positives[0] for s in found}) == 8
    tau = torch.tensor([TEMPERATURES[sample.record.source] for sample in found])
    scores = queries @ candidates.T / tau[:, None]
    return torch.nn.functional.cross_entropy(scores, torch.arange(8), reduction="none")


@pytest.mark.parametrize("case", ["cl-whole", "cl-cached"])
@pytest.mark.parametrize("world", WORLDS)
def test_stage_2_temperature_and_loss_by_source(run: RunConfig, case: str, world: int) -> None:
    """Also with gradient caching and prefixes."""
    model, tokenizer = plain(run)
    found, probe = samples(run, 2), probed(run, case, world)
    texts = [s.record.query for s in found] + [s.record.positives[0] for s in found]
    texts += [text for s in found for text in s.record.negatives[:1]]
    states = [
        model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        for ids in tokenizer.contexts(texts)
    ]
    vectors = torch.stack(states)
    whole = losses_of(vectors, found, vectors.shape[1])
    loss = whole.mean()
    if case == "cl-cached":
        assert probe["micro_batches"] > 1
        loss = (loss + 0.5 * losses_of(vectors, found, 8).mean()) / 1.5
    loss.backward()
    assert distance(probe["grads"], model) <= TOLERANCE
    stats, total = probe["stats"], 0.0
    for name in TEMPERATURES:
        own = [n for n, sample in enumerate(found) if sample.record.source == name]
        assert stats[f"samples/{name}"] == len(own)
        assert stats[f"loss/{name}"] == pytest.approx(whole[own].mean().item(), rel=TOLERANCE)
        total += stats[f"loss/{name}"] * len(own) / 8
    assert total == pytest.approx(stats["loss"], rel=TOLERANCE)
    tokens = sum(len(ids) for ids in tokenizer.contexts(texts))
    placeholders = sum(
        len(tokenizer.contexts([s.record.positives[0]])[0]) for s in found if not s.record.negatives
    )
    assert stats["tokens/one"] + stats["tokens/two"] == tokens + placeholders


@pytest.mark.parametrize("world", WORLDS)
def test_homogeneous_steps_resume_bit_for_bit(run: RunConfig, world: int) -> None:
    whole, resumed = (run.run / f"{name}-{world}" / "stage2" for name in ("whole", "resumed"))
    found = metrics(whole)
    assert found == metrics(resumed)
    weights = [
        checkpoints(folder)[-1] / "model" / "model.safetensors" for folder in (whole, resumed)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    kinds = [[n for n in TEMPERATURES if row[f"samples/{n}"]] for row in found]
    assert all(len(kind) == 1 for kind in kinds)
    for row, (name,) in zip(found, kinds, strict=True):
        assert row["loss"] == pytest.approx(row[f"loss/{name}"], rel=1e-6)
        assert row[f"samples/{name}"] == 8
    homogeneous = load(run.run / "recipe.yaml", ["stage2.homogeneous=true"]).mixing(2)
    assert homogeneous is not None
    order = mixture_of(
        Manifest.load(run.data.folder).shards("cl"), homogeneous, seed=run.seed, lanes=8
    )
    counted = {name: sum(row[f"samples/{name}"] for row in found) for name in TEMPERATURES}
    assert counted == order.drawn(4)


def test_ranks_see_the_same(run: RunConfig) -> None:
    one, two = (metrics(run.run / f"whole-{world}" / "stage2") for world in WORLDS)
    for ours, theirs in zip(one, two, strict=True):
        assert [k for k in ours if "/" in k] == [k for k in theirs if "/" in k]
        for key in (k for k in ours if "/" in k):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_a_weight_of_an_unknown_source_is_refused(run: RunConfig) -> None:
    sources = "[{path: a, name: one}, {path: b, name: three, weight: 2}]"
    wrong = load(run.run / "recipe.yaml", [f"data.sources={sources}"])
    with pytest.raises(ConfigError, match=r"'three' has a weight.* are of one, two$"):
        check_sources(wrong, Manifest.load(run.data.folder))
