"""The kernels of IB attention: attention inside each segment of a packed batch.

`rectangles` calls scaled_dot_product_attention on segments of similar length, on every device. On
Hopper it runs cuDNN's kernel, the fastest for long segments. `varlen` is torch's variable-length
kernel, one call for all segments (CUDA, bf16 or fp16), the fastest for many short ones. Each takes
rows laid out in its own way; `attend` lays a batch's rows out, and reads the outputs back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen
from torch.nn.functional import scaled_dot_product_attention

from lbr_ds.errors import ConfigError
from lbr_ds.model.attention_costs import RECTANGLES, VARLEN
from lbr_ds.objectives.ib_segments import RowLayout, Segments

Kernel = Callable[..., Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    kernel: str,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attend inside each segment.

    Args:
        q: (T, H, d), the batch's rows.
        k: (T, Hkv, d), likewise.
        v: (T, Hkv, d), likewise.
        segments: which rows attend to each other.
        kernel: a name of KERNELS.
        causal: whether a row sees only earlier ones of its segment.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        (T, H, d).
    """
    layout = layout_for(kernel, segments)
    if layout is None:
        return KERNELS[kernel](q, k, v, segments, causal=causal, scale=scale)
    q, k, v = (_LayOut.apply(x, layout) for x in (q, k, v))
    out = KERNELS[kernel](q, k, v, segments, causal=causal, scale=scale)
    return _ReadBack.apply(out, layout)


def check_window(segments: Segments, window: int | None) -> None:
    """Raise ConfigError if a segment exceeds the backbone's sliding window."""
    if window is not None and segments.longest > window:
        raise ConfigError(
            f"a sequence of {segments.longest} tokens exceeds the backbone's sliding window of "
            f"{window}; lower model.max_length"
        )


def layout_for(kernel: str, segments: Segments) -> RowLayout | None:
    """Return how a kernel wants the rows; None: as the batch has them."""
    if kernel == RECTANGLES:
        return segments.grid
    return None if segments.identity else segments.flat


def laid_out(x: Tensor, layout: RowLayout) -> Tensor:
    """Lay the batch's rows (T, H, d) out as (P, H, d)."""
    return x.index_select(0, layout.source)


def gradient_of_laid_out(slope: Tensor, layout: RowLayout) -> Tensor:
    """Return the gradient (T, H, d) of what was laid out, from the kernel's (P, H, d).

    Autograd's own index backward adds row by row into zeros. Here every row occurs once, and those
    of B twice, so the gradient is one gather and a few additions, in a fixed order. Padding rows
    have no gradient: no output that is kept sees them.
    """
    grad = slope.index_select(0, layout.output)
    if len(layout.copied):
        grad[layout.copied] += slope.index_select(0, layout.copies)  # no index occurs twice
    return grad


def read_back(x: Tensor, layout: RowLayout) -> Tensor:
    """Return the batch's rows (T, H, d) of the kernel's (P, H, d), without outputs of copies."""
    return x.index_select(0, layout.output)


def gradient_of_read_back(slope: Tensor, layout: RowLayout) -> Tensor:
    """Return the gradient (P, H, d) of the kernel's outputs, from that of the batch's rows."""
    zeros = slope.new_zeros(len(layout.source), *slope.shape[1:])
    return zeros.index_copy_(0, layout.output, slope.contiguous())


class _LayOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return laid_out(x, layout)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return gradient_of_laid_out(slope, ctx.layout), None


class _ReadBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return read_back(x, layout)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return gradient_of_read_back(slope, ctx.layout), None


def rectangles(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """Attend inside each segment, rectangle by rectangle, and return (P, H, d).

    Segments are padded at the end, so the causal flag alone hides the padding. Bidirectional
    attention needs a mask of (n, 1, 1, L) for it.

    Args:
        q: (P, H, d), laid out as `segments.grid` says.
        k: (P, Hkv, d), likewise.
        v: (P, Hkv, d), likewise.
        segments: which rows attend to each other.
        causal: whether a row sees only earlier ones of its segment.
        scale: of the scores; None: 1 / sqrt(d).
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
    """Do the same on rows laid out as `segments.flat` says, in one call (CUDA, bf16 or fp16)."""
    kernel = torch_varlen.varlen_attn
    grouped: dict[str, Any] = (
        {"enable_gqa": q.shape[1] != k.shape[1]} if _asks_for_groups(kernel) else {}
    )
    out = kernel(
        q,
        k,
        v,
        segments.starts,
        segments.starts,
        segments.longest,
        segments.longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **grouped,
    )
    assert isinstance(out, Tensor)  # a pair only with auxiliary outputs
    return out


@functools.cache
def _asks_for_groups(kernel: Kernel) -> bool:
    """Return whether grouped heads need `enable_gqa`: torch 2.11 takes them without."""
    return "enable_gqa" in inspect.signature(kernel).parameters


KERNELS: dict[str, Kernel] = {RECTANGLES: rectangles, VARLEN: varlen}
