"""Every attention kernel equals the dense mask, and the cost rule picks the fastest for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from lbr_ds.batching import Sequence, pack
from lbr_ds.errors import ConfigError
from lbr_ds.model import attention_calibration as calibration
from lbr_ds.model.attention_calibration import Heads, calibrate, measure
from lbr_ds.model.attention_costs import (
    RECTANGLES,
    VARLEN,
    Cost,
    Kernels,
    Work,
    fit,
    work_of,
)
from lbr_ds.model.attention_kernels import attend
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder
from tests.dense import dense_mask
from tests.tiny import backbone

CPU = torch.device("cpu")
SEQUENCES = [
    Sequence(list(range(7)), 3, list(range(5))),
    Sequence(list(range(4)), 2),
    Sequence(list(range(90)), 4, [1]),
    Sequence(list(range(3)), 3, list(range(40))),
]
UNCUT = [Sequence(list(range(n)), 2) for n in (7, 30, 2)]  # laid out as the batch is


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What torch's `varlen_attn` computes, with the signature that it has in torch 2.11."""
    assert window_size in ((-1, 0), (-1, -1))
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    sizes = cu_seq_q.diff().tolist()
    outs = [
        scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in part),
            is_causal=window_size == (-1, 0),
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for part in zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outs)


def with_groups(query: Tensor, key: Tensor, *args: Any, enable_gqa: bool = False, **kw: Any) -> Any:
    """The same with the argument that torch has had since, and refuses grouped heads without."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return one_by_one(query, key, *args, **kw)


@pytest.fixture(params=[one_by_one, with_groups], ids=["torch-2.11", "later"])
def library(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """torch's own kernel runs on CUDA alone."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", request.param)
    return request.param


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kernel", [RECTANGLES, VARLEN])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("sequences", [SEQUENCES, UNCUT], ids=["cut", "uncut"])
def test_every_kernel_equals_the_dense_mask(
    kernel: str, key_heads: int, sequences: list[Sequence]
) -> None:
    batch = pack(sequences)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch.num_tokens, heads, 8, dtype=torch.float64, generator=generator)
        for heads in (4, key_heads, key_heads)
    )
    tensors = [x.requires_grad_() for x in (q, k, v)]
    found = attend(*tensors, batch.segments, kernel, causal=True, scale=0.3)
    wanted = scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in tensors),
        attn_mask=dense_mask(sequences),
        scale=0.3,
        enable_gqa=True,
    )[0].transpose(0, 1)
    slope = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        [found, *torch.autograd.grad(found, tensors, slope)],
        [wanted, *torch.autograd.grad(wanted, tensors, slope)],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def texts(*lengths: int, device: torch.device = CPU) -> Any:
    """The segments of `[X ; B ; Y]` with B of 4 tokens."""
    sequences = [Sequence([0] * (n + 4), 4, [0] * n) for n in lengths]
    return pack(sequences).to(device).segments


# gpu.md, section 3: an H100, torch 2.11, bf16, forward and all gradients in milliseconds, 2026-11.
LONG, MIDDLE = texts(8190), texts(2048, 2048, 2048, 2048)
SHORT = texts(*[30 + 120 * i // 329 for i in range(330)])
WIDE, NARROW = 12 * 128, 9 * 64
H100 = [
    (LONG, WIDE, {RECTANGLES: 3.74, VARLEN: 5.74}),
    (MIDDLE, WIDE, {RECTANGLES: 1.78, VARLEN: 3.41}),
    (SHORT, NARROW, {RECTANGLES: 7.88, VARLEN: 2.02}),
]


def test_the_rule_picks_what_was_fastest_on_an_h100() -> None:
    costs = {
        name: fit([(work_of(name, s, width), ms[name]) for s, width, ms in H100])
        for name in (RECTANGLES, VARLEN)
    }
    kernels = Kernels(costs)
    nowhere = torch.device("meta")  # whose tensors cannot be read: the host knows the lengths
    for segments, width, measured in H100:
        for name, cost in costs.items():
            assert cost.seconds(work_of(name, segments, width)) == pytest.approx(
                measured[name], rel=0.15
            )
        assert kernels.choose(segments, width) == min(measured, key=measured.__getitem__)
    assert kernels.choose(texts(8190, device=nowhere), WIDE) == RECTANGLES


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    made = Cost(3e-5, 2e-14, 4e-11)
    works = [Work(1, 2e10, 6e6), Work(1, 4e8, 6e6), Work(30, 2e9, 9e6), Work(90, 1e7, 1e6)]
    found = fit([(work, made.seconds(work)) for work in works])
    assert found == pytest.approx(made, rel=1e-6)
    without_calls = [(work, work.pairs * 1e-12 - 1e-9 * work.calls) for work in works]
    assert fit(without_calls).call == 0


def test_a_wanted_kernel_is_the_only_one_or_refused() -> None:
    heads = Heads(4, 2, 8)
    only = calibrate(CPU, torch.float32, heads, RECTANGLES)
    assert only.choose(SHORT, heads.width) == RECTANGLES
    assert calibrate(CPU, torch.bfloat16, heads).choose(SHORT, heads.width) == RECTANGLES
    with pytest.raises(ConfigError, match="attention_kernel=varlen cannot be used"):
        calibrate(CPU, torch.float32, heads, VARLEN)


@pytest.mark.usefixtures("library")
def test_a_kernel_is_measured_and_must_agree(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibration, "_TIMED", ([256], [32] * 8, list(range(32, 160, 32))))
    heads = Heads(2, 1, 8)
    for name in (RECTANGLES, VARLEN):
        with torch.inference_mode():  # as at the first texts of an encoder
            assert max(measure(name, CPU, torch.float32, heads)) > 0
            assert calibration.agrees(name, CPU, torch.float32, heads)
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *a, **kw: one_by_one(*a, **kw) * 1.1)
    assert not calibration.agrees(VARLEN, CPU, torch.float32, heads)
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *a, **kw: 1 / 0)
    assert not calibration.agrees(VARLEN, CPU, torch.float32, heads)
    assert "varlen attention failed its self-test and is not used" in caplog.text
    assert "varlen attention is not usable here: division by zero" in caplog.text


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("fast", [RECTANGLES, VARLEN])
def test_one_choice_serves_all_layers_of_a_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(backbone(tmp_path), dtype=torch.float64)
    embedder = Embedder(model, Card(2, 32, "last", "causal"))
    batch = pack([Sequence([*range(5, 20)], 2, [4, 5, 6]), Sequence([*range(7, 12)], 2, [8, 9])])
    wanted = embedder(batch)
    chosen: list[str] = []
    costs = {name: Cost(0, 0, 1 if name == fast else 9) for name in (RECTANGLES, VARLEN)}
    embedder.kernels = Kernels(costs)
    choose = Kernels.choose

    def noted(self: Kernels, *args: Any) -> str:
        chosen.append(choose(self, *args))
        return chosen[-1]

    monkeypatch.setattr(Kernels, "choose", noted)
    torch.testing.assert_close(embedder(batch), wanted, rtol=1e-12, atol=0)
    assert chosen == [fast]
