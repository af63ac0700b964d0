"""What the planner says of a step, against the sequences that training makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lbr_ds.batching import TextTokenizer
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.config import OBJECTIVES, BottleneckConfig, ModelConfig, load
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.objectives.generative import ib_generative_loss
from lbr_ds.plan.memory import head
from lbr_ds.plan.shape import shape_of_config
from lbr_ds.plan.work import Work, work_of
from lbr_ds.records import Record
from tests.dense import dense_mask
from tests.tiny import SHAPE, backbone

LENGTH, TARGET, COUNT = 24, 9, 2
LONG = Record("1", "s", query="pain in the liver " * 20, positives=["a fever of the heart " * 20])


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("work") / "raw")


@pytest.fixture(scope="module")
def encoders(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TextTokenizer]:
    """Without a bottleneck, and with COUNT tokens."""
    made = {}
    for count in (0, COUNT):
        folder = tmp_path_factory.mktemp("made") / str(count)
        config = ModelConfig(backbone=str(raw), max_length=LENGTH)
        prepare_backbone(config, BottleneckConfig(count=count), folder, 0)
        made[count] = TextTokenizer(load_tokenizer(folder), max_length=LENGTH, num_bottleneck=count)
    return made


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_counted_as_training_makes_it(
    objective: str, raw: Path, encoders: dict[int, TextTokenizer]
) -> None:
    """Length, targets, copied rows and query-key pairs of the longest sequence."""
    count = COUNT if OBJECTIVES[objective].bottleneck else 0
    sequence = generative_sequence(
        LONG, objective, encoders[count], turn=0, max_target_length=TARGET
    )
    keys = {
        "model.backbone": raw,
        "model.max_length": LENGTH,
        "stage1.max_target_length": TARGET,
        "stage1.objective": f"{{{objective}: 1}}",
        "bottleneck.count": count,
    }
    work = work_of(load("demo", [f"{key}={value}" for key, value in keys.items()]), 1, 1)
    assert (work.length, work.supervised) == (len(sequence), len(sequence.target))
    assert work.copies == (count if sequence.cut else 0)
    assert work.pairs == dense_mask([sequence]).sum()


@pytest.mark.parametrize(("rows", "hidden"), [(900, 600), (70, 64), (500, 96)])
def test_the_heads_memory_is_what_the_loss_holds(rows: int, hidden: int) -> None:
    """Logits of one chunk, the gradients of the weight and of the rows that are read, in fp32."""
    vocab = 2000
    config = {**SHAPE, "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden}
    shape = shape_of_config(config, "made-up")
    work = Work(1, 1, rows, rows, 0, 0.0, 1, 1, False, 0, 0)
    states = torch.randn(rows, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    measured = peak_bytes(lambda: ib_generative_loss(states, weight, targets))
    planned, _ = head(shape, work, 4, gpu=False)
    assert planned - states.nbytes == pytest.approx(measured, rel=0.02)


def test_a_mixture_counts_each_objective_by_its_weight() -> None:
    """One part ib_sft and three parts ib_continue."""
    keys = [f"model.max_length={LENGTH}", f"stage1.max_target_length={TARGET}"]

    def work(objective: str) -> Work:
        return work_of(load("demo", [*keys, f"stage1.objective={objective}"]), 1, 1)

    one, other, both = (work(o) for o in ("ib_sft", "ib_continue", "{ib_sft: 1, ib_continue: 3}"))
    assert both.length == round(0.25 * one.length + 0.75 * other.length)
    assert both.pairs == pytest.approx(0.25 * one.pairs + 0.75 * other.pairs)


def test_pairs_of_a_mixture_are_the_mean() -> None:
    """Three parts cut at the bottleneck, one part plain; pairs counted on the masks themselves."""
    run = load(
        "huatuo-7b",
        [
            "model.max_length=8",
            "stage1.max_target_length=5",
            "stage1.objective={ib_sft: 3, plain_sft: 1}",
        ],
    )
    plain = torch.ones(13, 13).tril()
    cut = plain.clone()
    cut[8:, : 8 - run.bottleneck.count] = 0
    assert work_of(run, 1, 1).pairs == float(0.75 * cut.sum() + 0.25 * plain.sum())
