"""IB attention (paper, section 3.2) as plain causal attention over segments, without a mask.

`Segments` (batching/pack.py) has turned the rule "Y sees B and earlier Y, never X" into rows to
copy, so this file only runs attention inside each segment and puts the outputs back. It is
registered under the name `lbr_ib` with transformers' AttentionInterface, so any backbone that takes
an attention interface works with no copied model code; as no mask function bears that name,
transformers builds no mask either (5.23, masking_utils._preprocess_mask_arguments).

Three kernels, same result. CUDA in half precision: `varlen` (one torch.nn.attention.varlen call),
or where that is not usable `flex` (FlexAttention); each is tried against the third at its first
use. Everywhere else: `rectangles`, scaled_dot_product_attention on segments of like length.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lbr_ds.batching import Segments, Sequence, Spread, pack
from lbr_ds.errors import ConfigError

NAME = "lbr_ib"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # kwargs by which a backbone changes scores

Kernel = Callable[..., Tensor]

log = logging.getLogger(__name__)


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    bidirectional: bool = False,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query (1, H, T, d), key and value (1, Hkv, T, d).

    Returns (1, T, H, d). bidirectional: every row of a segment sees the whole segment (a stage-2
    baseline). Raises ConfigError for a backbone whose scores need more than a scale.
    """
    if segments is None:
        raise ConfigError(f"attention {NAME!r} was called without segments; use model.Embedder")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ConfigError(f"this backbone's attention uses {name}, which {NAME} does not do")
    window = kwargs.get("sliding_window")
    if window is not None and segments.longest > window:
        raise ConfigError(
            f"a sequence of {segments.longest} tokens exceeds the backbone's sliding window of "
            f"{window}; lower model.max_length"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
    attend = kernel(q)
    if attend is rectangles:
        spread = segments.grid
    elif segments.identity:
        out = attend(q, k, v, segments, causal=not bidirectional, scale=scaling)
        return out.unsqueeze(0), None
    else:
        spread = segments.flat
    q, k, v = (_Out.apply(x, spread) for x in (q, k, v))
    out = attend(q, k, v, segments, causal=not bidirectional, scale=scaling)
    return _Back.apply(out, spread).unsqueeze(0), None


AttentionInterface.register(NAME, segment_attention)


class _Out(torch.autograd.Function):
    """The batch's rows (T, H, d) -> the kernel's (P, H, d).

    Autograd's own index backward adds row by row into zeros. Here every row stands once, and B's a
    second time, so the gradient is one gather and a few additions, in a fixed order. Rows that only
    fill up have no gradient: no kept output sees them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return x.index_select(0, spread.take)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        spread = ctx.spread
        grad = slope.index_select(0, spread.put)
        if len(spread.twice):
            grad[spread.twice] += slope.index_select(0, spread.again)  # no index stands twice
        return grad, None


class _Back(torch.autograd.Function):
    """The kernel's rows (P, H, d) -> the batch's (T, H, d); what the copies see is dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return x.index_select(0, spread.put)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        spread = ctx.spread
        zeros = slope.new_zeros(len(spread.take), *slope.shape[1:])
        return zeros.index_copy_(0, spread.put, slope.contiguous()), None


def rectangles(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """Attention inside each segment, rectangle by rectangle. q (P, H, d), k and v (P, Hkv, d).

    Rows are laid out as `segments.grid` says; returns (P, H, d). Segments are filled up at the end,
    so the causal flag alone keeps filling out of sight. Bidirectional attention has no such luck:
    there the filling is masked, a (n, 1, 1, L) mask.
    """
    dtype = q.dtype
    if q.requires_grad and q.device.type == "cpu" and q.itemsize == 2:
        # torch 2.13: the backward of short segments takes five times as long as in fp32.
        q, k, v = q.float(), k.float(), v.float()
    outs = []
    sizes = [n * width for n, width in segments.shapes]
    parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    lengths = segments.lengths.split([n for n, _ in segments.shapes])
    for shape, tokens, part in zip(segments.shapes, lengths, parts, strict=True):
        query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in part)  # (n, H, L, d)
        mask = None
        if not causal:
            inside = torch.arange(shape[1], device=tokens.device) < tokens[:, None]
            mask = inside[:, None, None, :]
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).to(dtype)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """The same on rows laid out as `segments.flat` says, in one call (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        segments.starts,
        segments.starts,
        segments.longest,
        segments.longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
    return out


def flex(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """As `varlen`, by FlexAttention: a compiled kernel and a sparse map of 128 x 128 blocks."""
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # (1, H, S, d)
    out = _compiled_flex()(
        query,
        key,
        value,
        block_mask=_blocks(segments, causal),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # the number of rows differs by batch


@functools.lru_cache(maxsize=2)
def _blocks(segments: Segments, causal: bool) -> Any:
    """The block mask of a batch, made once for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = segments.starts.diff()
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        same = owner[row] == owner[column]
        return same & (row >= column) if causal else same

    return create_block_mask(sees, None, None, len(owner), len(owner), device=owner.device)


def kernel(q: Tensor) -> Kernel:
    """The fastest kernel that can serve these tensors (T, H, d) and has proved itself here."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        for attend in (varlen, flex):
            if _agrees(attend, q.device, q.dtype, q.shape[-1]):
                return attend
    return rectangles


@functools.cache
def _agrees(attend: Kernel, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Self-test, once: values and gradients of `attend` and `rectangles` on a small cut batch."""
    batch = pack([Sequence([0] * 9, 2, [0] * 7), Sequence([0] * 5, 2, [0] * 12)]).to(device)
    segments = batch.segments
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, batch.num_tokens, 2, head_size, generator=generator).to(device, dtype)
    results = []
    # A thread of autograd's must not be asked for a graph inside the caller's no_grad.
    with torch.enable_grad():
        x.requires_grad_()
        for run, spread in ((rectangles, segments.grid), (attend, segments.flat)):
            q, k, v = (_Out.apply(part, spread) for part in x)
            try:
                out = _Back.apply(run(q, k, v, segments, causal=True, scale=None), spread)
                results.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
            except Exception as error:  # a compiler or a driver fails in ways of its own
                log.warning("%s attention is not usable here: %s", attend.__name__, error)
                return False
    agree = all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*results, strict=True))
    if not agree:
        log.warning("%s attention failed its self-test and is not used", attend.__name__)
    return agree
