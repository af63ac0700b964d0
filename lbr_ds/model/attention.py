"""IB attention (paper, section 3.2) as plain causal attention over segments, without a mask.

`Segments` (batching/pack.py) has turned the rule "Y sees B and earlier Y, never X" into rows to
copy, so this file only runs attention inside each segment and puts the outputs back. It is
registered under the name `lbr_ib` with transformers' AttentionInterface, so any backbone that takes
an attention interface works with no copied model code; as no mask function bears that name,
transformers builds no mask either (5.23, masking_utils._preprocess_mask_arguments).

Two kernels, same result: `rectangles` (scaled_dot_product_attention on groups of segments of like
length; any device) and `varlen` (one torch.nn.attention.varlen call; CUDA, half precision).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lbr_ds.batching import Segments, Sequence, pack
from lbr_ds.errors import ConfigError

NAME = "lbr_ib"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # kwargs by which a backbone changes scores

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
    if not segments.identity:
        q, k, v = q[segments.rows], k[segments.rows], v[segments.rows]
    attend = varlen if use_varlen(q) else rectangles
    out = attend(q, k, v, segments, causal=not bidirectional, scale=scaling)
    if not segments.identity:
        out = out[segments.keep]
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, segment_attention)


def rectangles(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """Attention inside each segment, group by group. q (S, H, d), k and v (S, Hkv, d) -> (S, H, d).

    A group's rows are filled up at the end, so the causal flag alone keeps filling out of sight.
    Bidirectional attention has no such luck: there the filling is masked, a (n, 1, 1, L) mask.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    outs = []
    for group in segments.groups:
        query, key, value = (x[group].transpose(1, 2) for x in (q, k, v))  # (n, H, L, d)
        mask = None
        if not causal:
            mask = torch.ones_like(group, dtype=torch.bool)
            mask[:, 1:] = group[:, 1:] != group[:, :-1]  # filling repeats the row before it
            mask = mask[:, None, None, :]
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale,
            enable_gqa=heads != kv_heads,
        )  # fmt: skip
        outs.append(out.transpose(1, 2).reshape(-1, heads, out.shape[-1]))
    return torch.cat(outs)[segments.flat]


def varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """The same in one call of torch's variable-length kernel (CUDA, bf16 or fp16)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q, k, v, segments.starts, segments.starts, segments.longest, segments.longest,
        scale=scale, window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
    return out


def use_varlen(q: Tensor) -> bool:
    """Whether the variable-length kernel can serve these tensors, and has proved itself here."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and _varlen_agrees(q.device, q.dtype, q.shape[-1])


@functools.cache
def _varlen_agrees(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Self-test, once: forward and gradients of both kernels on a small cut batch."""
    # A thread of autograd's must not be asked for a graph inside the caller's no_grad.
    with torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        batch = pack([Sequence([0] * 9, 2, [0] * 7), Sequence([0] * 5, 2, [0] * 12)])
        segments = batch.to(device).segments
        x = torch.randn(3, len(segments.rows), 2, head_size, generator=generator)
        x = x.to(device, dtype).requires_grad_()
        results = []
        for kernel in (rectangles, varlen):
            try:
                out = kernel(x[0], x[1], x[2], segments, causal=True, scale=None)
                results.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
            except (ImportError, RuntimeError, TypeError, ValueError) as error:
                log.warning("variable-length attention is not usable here: %s", error)
                return False
    agree = all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*results, strict=True))
    if not agree:
        log.warning("variable-length attention failed its self-test; using rectangles instead")
    return agree
