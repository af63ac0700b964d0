"""What a teacher says of a step's queries and candidates goes with them into the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lbr_ds.batching import TextTokenizer
from lbr_ds.batching.contrastive import contrastive_pairs
from lbr_ds.config import BottleneckConfig, ModelConfig
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.records import Record
from tests.tiny import backbone

RECORDS = [
    Record(
        "a",
        "s",
        "q",
        ["p", "r"],
        ["n", "m", "o"],
        document_instruction="D: ",
        positive_scores=[4, 5],
        negative_scores=[1, 2, 3],
    ),
    Record("b", "s", "x", ["y"], ["n", "m"]),
    Record("c", "s", "z", ["p"], ["n"], positive_scores=[3], negative_scores=[2.5]),
]
NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    model = ModelConfig(backbone=str(backbone(folder / "backbone")))
    prepare_backbone(model, BottleneckConfig(count=2), folder / "made", 0)
    return TextTokenizer(load_tokenizer(folder / "made"), max_length=24, num_bottleneck=2)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_scores_are_those_of_the_drawn_passages(tokenizer: TextTokenizer, turn: int) -> None:
    """Negatives are drawn two at a time, in turn."""
    pairs = contrastive_pairs(RECORDS, [turn] * 3, tokenizer, 2, scored=True)
    drawn = {0: [4, 1, 2], 1: [5, 3, 1], 2: [4, 2, 3]}[turn]
    wanted = torch.tensor([drawn, [NAN] * 3, [3, 2.5, NAN]])
    assert pairs.scores is not None
    torch.testing.assert_close(pairs.scores, wanted, rtol=0, atol=0, equal_nan=True)
    assert contrastive_pairs(RECORDS, [turn] * 3, tokenizer, 2).scores is None


def test_vectors_are_asked_for_by_the_texts_that_are_encoded(tokenizer: TextTokenizer) -> None:
    asked: list[str] = []

    def teacher(queries: list[str], passages: list[str]) -> NDArray[np.float16]:
        asked.extend(queries + passages)
        return np.arange(len(asked), dtype=np.float16)[:, None].repeat(2, 1)

    pairs = contrastive_pairs(RECORDS, [0] * 3, tokenizer, 2, teacher=teacher)
    assert asked == ["q", "x", "z", "D: p", "y", "p", "D: n", "D: m", "n", "m", "n", "p"]
    assert pairs.teacher is not None
    assert pairs.teacher[:-1, 0].tolist() == [*range(11)]
    assert pairs.teacher[-1].isnan().all()  # the place of a negative that the record lacks
