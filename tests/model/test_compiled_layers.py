"""Compiled layers equal eager ones; the number of graphs depends on neither layers nor batches."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention import varlen as torch_varlen
from transformers import AutoModelForCausalLM

from lbr_ds.batching import PackedBatch, Sequence, pack
from lbr_ds.model import opaque_attention
from lbr_ds.model.attention_costs import RECTANGLES, VARLEN, Cost, Kernels
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.compiled_layers import compile_layers
from lbr_ds.model.embedder import Embedder
from tests.model.test_attention_kernels import one_by_one
from tests.tiny import backbone

LAYERS = 4


class Noting:
    """A backend that keeps the graphs it is given, and runs them without a code generator."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph.code)
        return lookup_backend("aot_eager")(graph, inputs)


def embedder(folder: Path, checkpointing: bool = False) -> Embedder:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Embedder(model, Card(2, 128, "last", "causal"))


def batches(count: int, seed: int) -> list[PackedBatch]:
    """Of both stages in turn; numbers of rows, of sequences and of rectangles differ."""
    rng = random.Random(seed)

    def ids(fewest: int, most: int) -> list[int]:
        return [rng.randrange(300) for _ in range(rng.randrange(fewest, most))]

    return [
        pack(
            [
                Sequence(ids(4, 90), 2, [] if number % 2 else ids(1, 60))
                for _ in range(rng.randrange(2, 8))
            ]
        )
        for number in range(count)
    ]


def step(model: Embedder, batch: PackedBatch) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    out = model(batch)
    (out * torch.ones_like(out).cumsum(0)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


@pytest.mark.parametrize(
    ("family", "checkpointing", "fast"),
    [
        ("llama", False, RECTANGLES),
        pytest.param("qwen2", True, VARLEN, marks=pytest.mark.suites),
    ],
)
def test_ten_batches_take_two_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, checkpointing: bool, fast: str
) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", one_by_one)
    folder = backbone(tmp_path, family, num_hidden_layers=LAYERS)
    eager, compiled = (embedder(folder, checkpointing) for _ in range(2))
    backend = Noting()
    compiler = compile_layers(compiled.backbone.base_model, backend)
    compiled.kernels = Kernels({fast: Cost(0, 0, 0)})
    for batch in batches(10, seed=0):
        assert_equal(step(compiled, batch), step(eager, batch))
        assert len(backend.graphs) == 2  # the last layer computes only the rows that are read
    assert ["index_copy" in graph for graph in backend.graphs] == [False, True]
    with torch.no_grad():
        for batch in batches(4, seed=1):
            assert_equal([compiled(batch)], [eager(batch)])
    assert len(backend.graphs) == 4  # without gradients there are two more
    assert compiler is not None
    assert (compiler.active, compiler.graphs) == (True, 4)
    assert not torch._dynamo.utils.counters["graph_break"]
    kept = [storage.value for storage in opaque_attention._storages.values()]
    assert not any(isinstance(value, opaque_attention._Record) for value in kept)


def test_what_cannot_be_compiled_runs_eagerly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no such instruction\nand more")

    folder = backbone(tmp_path)
    eager, compiled = (embedder(folder) for _ in range(2))
    compiler = compile_layers(compiled.backbone.base_model, failing)
    with caplog.at_level(logging.WARNING):
        for batch in batches(2, seed=0):
            assert_equal(step(compiled, batch), step(eager, batch))
    assert compiler is not None
    assert not compiler.active
    (line,) = [record.message for record in caplog.records if "compile" in record.message]
    assert "LlamaDecoderLayer cannot be compiled, so layers run eagerly" in line
    assert "no such instruction" in line


@pytest.mark.suites
def test_generated_code_is_within_rounding(tmp_path: Path) -> None:
    folder = backbone(tmp_path)
    eager, compiled = (embedder(folder) for _ in range(2))
    compiler = compile_layers(compiled.backbone.base_model)
    for batch in batches(4, seed=0):
        assert_equal(step(compiled, batch), step(eager, batch))
    assert compiler is not None
    assert (compiler.active, compiler.graphs) == (True, 2)
