"""IB attention (paper, section 3.2) inside a transformers model, without a mask.

    use_ib_attention(model)                                 # any causal LM of transformers
    states = packed_forward(model, pack(sequences)).last_hidden_state[0]      # (T, D)

`ib_segments` (objectives/) has turned the rule "Y sees B and earlier Y, never X" into rows to
copy, so this file only runs attention inside each segment and reads the outputs back. It is
registered as `lbr_ib` with transformers' AttentionInterface, so any backbone that takes an
attention interface works with no copied model code; as no mask function has that name,
transformers builds no mask either (5.23, masking_utils._preprocess_mask_arguments).

Three kernels, one result. CUDA in half precision: `varlen` (one torch.nn.attention.varlen call),
or where that cannot be used `flex` (FlexAttention); each is compared with the third at its first
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
from transformers import AttentionInterface, PreTrainedModel

from lbr_ds.batching import PackedBatch, Sequence, pack
from lbr_ds.errors import ConfigError
from lbr_ds.objectives.ib_segments import RowLayout, Segments

NAME = "lbr_ib"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # kwargs by which a backbone changes scores

Kernel = Callable[..., Tensor]

log = logging.getLogger(__name__)


def use_ib_attention(model: PreTrainedModel) -> None:
    """Make a causal LM of transformers attend as `segments` say; see `packed_forward`."""
    model.set_attn_implementation(NAME)


def packed_forward(
    model: PreTrainedModel, batch: PackedBatch, *, bidirectional: bool = False, **options: Any
) -> Any:
    """Run the model's body, without its head, on a packed batch.

    Args:
        model: a causal LM after `use_ib_attention`.
        batch: what `lbr_ds.batching.pack` returns.
        bidirectional: let every row of a segment see the whole segment (a stage-2 baseline).
        **options: for the model's forward, such as `output_hidden_states`.

    Returns:
        transformers' output; its `last_hidden_state` is (1, T, D).
    """
    return model.base_model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        use_cache=False,
        segments=batch.segments,
        bidirectional=bidirectional,
        **options,
    )


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
    """Attend inside each segment; the function behind transformers' attention interface.

    Args:
        module: the attention module that calls.
        query: (1, H, T, d).
        key: (1, Hkv, T, d).
        value: (1, Hkv, T, d).
        attention_mask: ignored; transformers passes None.
        segments: which rows attend to each other.
        bidirectional: let every row of a segment see the whole segment (a stage-2 baseline).
        scaling: of the scores; None: 1 / sqrt(d).
        **kwargs: what else the backbone passes.

    Returns:
        (1, T, H, d), and None for the attention weights.

    Raises:
        ConfigError: the backbone's scores need more than a scale, or a segment exceeds its sliding
            window.
    """
    if segments is None:
        raise ConfigError(f"attention {NAME!r} was called without segments; use packed_forward")
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
        layout = segments.grid
    elif segments.identity:
        out = attend(q, k, v, segments, causal=not bidirectional, scale=scaling)
        return out.unsqueeze(0), None
    else:
        layout = segments.flat
    q, k, v = (_LayOut.apply(x, layout) for x in (q, k, v))
    out = attend(q, k, v, segments, causal=not bidirectional, scale=scaling)
    return _ReadBack.apply(out, layout).unsqueeze(0), None


AttentionInterface.register(NAME, segment_attention)


class _LayOut(torch.autograd.Function):
    """The batch's rows (T, H, d) -> the kernel's (P, H, d).

    Autograd's own index backward adds row by row into zeros. Here every row occurs once, and those
    of B twice, so the gradient is one gather and a few additions, in a fixed order. Padding rows
    have no gradient: no output that is kept sees them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.source)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        grad = slope.index_select(0, layout.output)
        if len(layout.copied):
            grad[layout.copied] += slope.index_select(0, layout.copies)  # no index occurs twice
        return grad, None


class _ReadBack(torch.autograd.Function):
    """The kernel's rows (P, H, d) -> the batch's (T, H, d); the outputs of copies are dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        zeros = slope.new_zeros(len(layout.source), *slope.shape[1:])
        return zeros.index_copy_(0, layout.output, slope.contiguous()), None


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
    assert isinstance(out, Tensor)  # a pair only with auxiliary outputs
    return out


def flex(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float | None
) -> Tensor:
    """Do as `varlen` with FlexAttention: a compiled kernel and a map of 128 x 128 blocks."""
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
    """Return the block mask of a batch, computed once for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = segments.starts.diff()
    owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        one_segment = owner[row] == owner[column]
        return one_segment & (row >= column) if causal else one_segment

    return create_block_mask(sees, None, None, len(owner), len(owner), device=owner.device)


def kernel(q: Tensor) -> Kernel:
    """Return the fastest kernel for tensors like q (T, H, d) that passes its self-test here."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        for attend in (varlen, flex):
            if _agrees(attend, q.device, q.dtype, q.shape[-1]):
                return attend
    return rectangles


@functools.cache
def _agrees(attend: Kernel, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Compare values and gradients of `attend` and `rectangles` on a small cut batch, once."""
    batch = pack([Sequence([0] * 9, 2, [0] * 7), Sequence([0] * 5, 2, [0] * 12)]).to(device)
    segments = batch.segments
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, batch.num_tokens, 2, head_size, generator=generator).to(device, dtype)
    results = []
    # The caller may be inside no_grad, where there would be no gradients to compare.
    with torch.enable_grad():
        x.requires_grad_()
        for run, layout in ((rectangles, segments.grid), (attend, segments.flat)):
            q, k, v = (_LayOut.apply(part, layout) for part in x)
            try:
                out = _ReadBack.apply(run(q, k, v, segments, causal=True, scale=None), layout)
                results.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
            except Exception as error:  # a compiler or a driver fails in ways of its own
                log.warning("%s attention is not usable here: %s", attend.__name__, error)
                return False
    agree = all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*results, strict=True))
    if not agree:
        log.warning("%s attention failed its self-test and is not used", attend.__name__)
    return agree
