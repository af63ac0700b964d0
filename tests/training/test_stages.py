"""A step's loss, gradient and update do not depend on ranks, packing or micro-batches.

Oracles: the same step written out in plain torch, every text alone, with a dense mask and the
masks of InfoNCE spelt out in Python; then one rank against two and four, on real ZeRO-3 processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lbr_ds.batching import TextTokenizer
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.config import RunConfig, load
from lbr_ds.model.bottleneck import bottleneck_token, load_tokenizer, prepare_backbone
from lbr_ds.shards import Sample, steps
from tests.dense import dense_mask
from tests.ranks import run_ranks
from tests.tiny import SHAPE, tiny_recipe
from tests.training.probe import CASES, COMPILER, HALF, LORA, OFFLOADED

pytestmark = pytest.mark.slow

WORLDS = (1, 2, 4)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose stage-2 step holds groups, shared positives and missing negatives."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("ranks"), group_every=20)
    run = load(recipe)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    (run.run / "recipe.yaml").write_text(run.dump())
    zero: dict[str, Any] = {"overlap_comm": False, "stage3_param_persistence_threshold": 0}
    for stage in (1, 2, 3):
        bucket = {"reduce_bucket_size": 3000} if stage < 3 else {}
        config = {"zero_optimization": {"stage": stage, **zero, **bucket}}
        (run.run / f"zero{stage}.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def probed(run: RunConfig) -> dict[tuple[str, int], dict[str, Any]]:
    """(case, world) -> what the probe wrote."""
    for world in WORLDS:
        run_ranks("tests.training.probe", world, str(run.run / "recipe.yaml"), str(run.run))
    pairs = [(c, w) for c in (*CASES, *LORA) for w in WORLDS] + [(c, 2) for c in HALF]
    return {(c, w): torch.load(run.run / f"{c}-{w}.pt") for c, w in pairs}


def samples(run: RunConfig, number: int) -> list[Sample]:
    """The whole step, as one rank would get it."""
    size = run.stage(number).samples_per_step
    split = {1: "gl", 2: "cl"}[number]
    stream = steps(
        run.data.folder, split, seed=run.seed, samples_per_step=size, rank=0, world=1, stop=1
    )
    return next(iter(stream)).samples


def plain_model(run: RunConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(run.run / "backbone", attn_implementation="sdpa")


def text_tokenizer(run: RunConfig) -> TextTokenizer:
    return TextTokenizer(
        load_tokenizer(run.run / "backbone"),
        max_length=run.model.max_length,
        num_bottleneck=run.bottleneck.count,
    )


def generative_oracle(run: RunConfig, bag: float) -> tuple[float, float, dict[str, Tensor]]:
    """Stage 1 one sequence at a time, dense mask, logits whole; bag: weight of the words' loss."""
    model, tokenizer = plain_model(run), text_tokenizer(run)
    loss, bags, count = torch.zeros(()), [], 0
    for sample in samples(run, 1):
        seq = generative_sequence(sample.record, "ib_sft", tokenizer, turn=0, max_target_length=32)
        ids = torch.tensor([seq.context + seq.target])
        logits = model(ids, attention_mask=dense_mask([seq])[None, None]).logits[0]
        first = len(seq.context) - 1
        loss = loss + torch.nn.functional.cross_entropy(
            logits[first:-1], torch.tensor(seq.target), reduction="sum"
        )
        count += len(seq.target)
        words = list(
            dict.fromkeys(i for i in seq.target if i not in tokenizer.backend.all_special_ids)
        )
        bags.append(-logits[first].log_softmax(0)[words].mean())
    loss, told = loss / count, torch.stack(bags).mean()
    return loss.item(), told.item(), gradients(model, loss + bag * told)


def contrastive_oracle(
    run: RunConfig, prefixes: Mapping[int, float] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Stage 2 one text at a time, the rule of what is a negative in plain Python.

    Returns the loss of the whole vectors, and the gradients of the mean over whole and prefixes.
    """
    model, tokenizer = plain_model(run), text_tokenizer(run)
    records = [s.record for s in samples(run, 2)]

    def embed(text: str) -> Tensor:
        ids = torch.tensor(tokenizer.contexts([text]))
        state = model.base_model(ids).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(state, dim=-1)

    queries = [embed(r.query) for r in records]
    candidates = [(r.positives[0], r.group) for r in records]
    candidates += [(n, None) for r in records for n in r.negatives[:1]]
    vectors = [embed(text) for text, _ in candidates]
    blocked = 0
    losses: dict[int, Tensor] = {}
    weights = {len(queries[0]): 1.0, **(prefixes or {})}
    for size in weights:
        losses[size] = torch.zeros(())
        short = [torch.nn.functional.normalize(v[:size], dim=-1) for v in (*queries, *vectors)]
        for i, record in enumerate(records):
            scores = [short[i] @ short[len(queries) + i]]
            for j, (text, group) in enumerate(candidates):
                if j == i:
                    continue
                if group == record.group or text in record.positives:
                    blocked += 1
                    continue
                scores.append(short[i] @ short[len(queries) + j])
            row = torch.stack(scores) / run.stage2.temperature
            losses[size] = losses[size] - row.log_softmax(0)[0] / len(records)
    assert blocked, "the step must hold pairs of one group, or this tests nothing"
    weighted = torch.stack([weight * losses[size] for size, weight in weights.items()])
    whole = losses[len(queries[0])].item()
    return whole, gradients(model, weighted.sum() / sum(weights.values()))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Relative error over all parameters together."""
    difference = sum((found[n] - w).double().square().sum() for n, w in wanted.items())
    return float((difference / sum(w.double().square().sum() for w in wanted.values())).sqrt())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_step_equals_plain_torch(
    run: RunConfig, probed: dict[tuple[str, int], dict[str, Any]], case: str, world: int
) -> None:
    found = probed[case, world]
    if case.startswith("gl"):
        loss, told, grads = generative_oracle(run, 0.7 if case == "gl-bag" else 0)
        if case == "gl-bag":
            assert found["stats"]["bag_loss"] == pytest.approx(told, rel=TOLERANCE)
    else:
        prefixes = {8: 0.5, 4: 2.0} if case == "cl-prefixes" else None
        loss, grads = contrastive_oracle(run, prefixes)
    assert found["stats"]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert distance(found["grads"], grads) <= TOLERANCE
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    assert found["norm"] == pytest.approx(norm, rel=TOLERANCE)


@pytest.mark.parametrize("case", [name for name in LORA if name != "cl-lora-dropout"])
@pytest.mark.parametrize("world", WORLDS)
def test_adapters_step_equals_plain_torch(
    run: RunConfig, probed: dict[tuple[str, int], dict[str, Any]], case: str, world: int
) -> None:
    """By the chain rule from the plain gradients: of the adapters, and of the bottleneck's rows."""
    found = probed[case, world]
    bag = 0.7 if case.endswith("bag") else 0
    oracle = generative_oracle(run, bag)[::2] if case[:2] == "gl" else contrastive_oracle(run)
    loss, slopes = oracle
    assert found["stats"]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    new = text_tokenizer(run).backend.convert_tokens_to_ids(
        [bottleneck_token(i) for i in range(run.bottleneck.count)]
    )
    wanted = {"rows.difference": slopes["model.embed_tokens.weight"][new]}
    for name, down in found["before"].items():
        if ".lora_A." in name:
            weight = name.replace(".lora_A.default", "")
            wanted[name] = torch.zeros_like(down)  # its partner is zero at first
            wanted[name.replace("lora_A", "lora_B")] = slopes[weight] @ down.T * 2  # alpha / rank
    assert found["grads"].keys() == found["before"].keys() == wanted.keys()
    assert distance(found["grads"], wanted) <= TOLERANCE
    norm = torch.stack([g.norm() for g in wanted.values()]).norm().item()
    assert found["norm"] == pytest.approx(norm, rel=TOLERANCE)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", LORA)
def test_adapters_leave_the_rest_alone(
    run: RunConfig, probed: dict[tuple[str, int], dict[str, Any]], case: str, world: int
) -> None:
    """Merged weights after two steps: only the table's new rows and the layers' matrices moved."""
    before, after = plain_model(run).state_dict(), probed[case, world]["second_after"]
    for name, tensor in after.items():
        moved = (tensor != before[name]).reshape(len(tensor), -1).any(1)
        if "embed_tokens" in name:
            tokens = text_tokenizer(run).backend.convert_ids_to_tokens(moved.nonzero()[:, 0])
            assert tokens == [bottleneck_token(i) for i in range(run.bottleneck.count)]
        else:
            assert bool(moved.any()) is ("_proj" in name), name


def test_a_chunk_drops_the_same_numbers_in_both_encodings(
    probed: dict[tuple[str, int], dict[str, Any]],
) -> None:
    found, whole = probed["cl-lora-dropout", 2], probed["cl-lora", 2]
    for turn in ("heard", "second_heard"):
        count = len(found[turn]) // 2
        assert count > 1
        for ours, again in zip(found[turn][:count], found[turn][count:], strict=True):
            assert torch.equal(ours, again)
    # At first the adapters give nothing, whatever is dropped.
    assert found["stats"]["loss"] == pytest.approx(whole["stats"]["loss"], rel=TOLERANCE)
    assert found["second_stats"]["loss"] != pytest.approx(whole["second_stats"]["loss"], rel=1e-4)


@pytest.mark.parametrize("case", [*CASES, "gl-lora", "gl-lora-bag", "cl-lora"])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_update_does_not_depend_on_ranks(
    probed: dict[tuple[str, int], dict[str, Any]], case: str, world: int
) -> None:
    for turn in ("after", "second_after"):
        assert distance(probed[case, world][turn], probed[case, 1][turn]) <= TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c[:3] == "cl-" and c != "cl-prefixes"])
@pytest.mark.parametrize("world", WORLDS)
def test_gradient_caching_equals_one_big_batch(
    probed: dict[tuple[str, int], dict[str, Any]], case: str, world: int
) -> None:
    """Chunks of any size, reduced at once or one by one, on any ranks; both steps."""
    found, wanted = probed[case, world], probed["cl-whole", 1]
    # The whole step on one rank and on two differ by 6e-7: that is fp32.
    assert distance(found["grads"], wanted["grads"]) <= 2e-6
    assert distance(found["second_grads"], wanted["second_grads"]) <= TOLERANCE
    for turn in ("stats", "second_stats"):
        assert found[turn] == pytest.approx(wanted[turn], rel=1e-4)


@pytest.mark.parametrize(
    ("case", "parts"), [("gl-cut", "gl-by-part"), ("cl-checkpointing", "cl-by-part")]
)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_layers_gathered_whole_or_by_part_are_one_step(
    probed: dict[tuple[str, int], dict[str, Any]], case: str, parts: str, world: int
) -> None:
    """With leaf modules and without: gradients, norms and weights of both steps."""
    whole, cut = probed[case, world], probed[parts, world]
    assert (whole["leaves"], cut["leaves"]) == (SHAPE["num_hidden_layers"], 0)
    for turn in ("", "second_"):
        assert distance(whole[f"{turn}grads"], cut[f"{turn}grads"]) <= 2e-6
        assert distance(whole[f"{turn}after"], cut[f"{turn}after"]) <= 2e-6
        assert whole[f"{turn}norm"] == pytest.approx(cut[f"{turn}norm"], rel=2e-6)


@pytest.mark.parametrize("case", HALF)
def test_bf16_layouts_step_in_the_same_direction(
    probed: dict[tuple[str, int], dict[str, Any]], case: str
) -> None:
    """ZeRO-1, 2 and 3 in bf16 against fp32: the loss to 1 %, the gradient's direction to 1 %."""
    found, wanted = (
        probed[case, 2],
        probed[f"{case[:2]}-cut" if case[:2] == "gl" else "cl-cached", 2],
    )
    assert found["stats"]["loss"] == pytest.approx(wanted["stats"]["loss"], rel=0.01)
    ours = torch.cat([found["grads"][n].flatten().float() for n in wanted["grads"]])
    theirs = torch.cat([g.flatten() for g in wanted["grads"].values()])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("case", HALF)
def test_bf16_layouts_end_near_fp32(
    run: RunConfig, probed: dict[tuple[str, int], dict[str, Any]], case: str
) -> None:
    """Weights after a step: a layout's are nearer to zero3_cpu's than a fifth of the step."""
    wanted = probed["gl-cut" if case.startswith("gl") else "cl-cached", 2]["after"]
    before = {name: p.detach() for name, p in plain_model(run).named_parameters()}
    step = distance(before, wanted)
    assert distance(probed[case, 2]["after"], wanted) <= 0.2 * step


@pytest.mark.skipif(COMPILER is None, reason="DeepSpeed's Adam for the host needs a C++ compiler")
@pytest.mark.parametrize("layout", OFFLOADED)
@pytest.mark.parametrize("stage", ["gl", "cl"])
def test_offloaded_steps_are_those_of_zero3(
    probed: dict[tuple[str, int], dict[str, Any]], stage: str, layout: str
) -> None:
    """Same precision, other place: gradients alike, weights alike but for rounding, both steps."""
    found, wanted = probed[f"{stage}-{layout}", 2], probed[f"{stage}-zero3", 2]
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-3)
    for turn in ("", "second_"):
        assert distance(found[f"{turn}after"], wanted[f"{turn}after"]) <= 1e-3


def test_cut_cases_really_cut(probed: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert probed["gl-cut", 2]["micro_batches"] > 1
    for case in ("cl-cached", "cl-checkpointing", "cl-reduced-each"):
        assert probed[case, 2]["micro_batches"] > 1
    assert probed["cl-cached", 2]["one_reduction"] is True
    assert probed["cl-reduced-each", 2]["one_reduction"] is False
    assert probed["gl-whole", 1]["micro_batches"] == probed["cl-whole", 1]["micro_batches"] == 1
