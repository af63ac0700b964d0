"""IB attention as one operator that `torch.compile` does not look into.

Traced into, the loop over a batch's rectangles would give a graph for every batch. So a compiled
layer calls the operator `lbr_ds::attend`, which runs the same kernels as an eager layer does. Its
backward runs the kernels' own backward: the forward records it with autograd, and hands the record
on to the backward.

What operators take and give are tensors. A batch's segments and the record are handed through the
graph as a `token`: a tensor of a few bytes whose storage keeps a Python object alive. The object is
freed with the last tensor of that storage, so also when activation checkpointing drops it.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lbr_ds.model.attention_kernels import (
    KERNELS,
    check_window,
    gradient_of_laid_out,
    gradient_of_read_back,
    laid_out,
    layout_for,
    read_back,
)
from lbr_ds.objectives.ib_segments import RowLayout, Segments

_BYTES = 8
# The dispatcher's state outside of any operator, in which autograd records.
_RECORDING = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)


class _Storage(bytearray):
    """The memory of a token."""

    value: Any


_storages: WeakValueDictionary[int, _Storage] = WeakValueDictionary()


def token_of(value: Any) -> Tensor:
    """Return a token, (8,) uint8 on the CPU, that represents `value` and keeps it alive."""
    storage = _Storage(_BYTES)
    storage.value = value
    token = torch.frombuffer(storage, dtype=torch.uint8)  # holds a reference to the storage
    _storages[token.data_ptr()] = storage
    return token


def value_of(token: Tensor) -> Any:
    """Return what a token represents."""
    return _storages[token.data_ptr()].value


class Attending(NamedTuple):
    """What a forward's attention needs beside the rows: its segments and the kernel's name."""

    segments: Segments
    kernel: str


class _Record(NamedTuple):
    """What the backward needs: the kernel's inputs and output, on which autograd has recorded."""

    inputs: list[Tensor]
    output: Tensor
    layout: RowLayout | None


@torch.library.custom_op("lbr_ds::attend", mutates_args=())
def opaque_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attending: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    record: bool,
) -> tuple[Tensor, Tensor]:
    """Attend inside each segment.

    Args:
        query: (T, H, d), the batch's rows.
        key: (T, Hkv, d), likewise.
        value: (T, Hkv, d), likewise.
        attending: the token of an `Attending`.
        causal: whether a row sees only earlier ones of its segment.
        scale: of the scores; None: 1 / sqrt(d).
        window: the backbone's sliding window, which no segment may exceed.
        record: whether there will be a backward.

    Returns:
        (T, H, d), and the token for the backward.
    """
    segments, kernel = value_of(attending)
    check_window(segments, window)
    layout = layout_for(kernel, segments)
    if not record:
        inputs = [_laid_out(x, layout) for x in (query, key, value)]
        out = KERNELS[kernel](*inputs, segments, causal=causal, scale=scale)
        return _read_back(out, layout), token_of(None)
    # The compiler may write over what it has passed and received, so the record owns its tensors.
    inputs = [_laid_out(x.detach(), layout, copy=True) for x in (query, key, value)]
    with (
        torch._C._ForceDispatchKeyGuard(*_RECORDING),
        torch.enable_grad(),
        # Hooks of activation checkpointing save the tokens, and must not save what is recorded.
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        inputs = [x.requires_grad_() for x in inputs]
        out = KERNELS[kernel](*inputs, segments, causal=causal, scale=scale)
    recorded = _Record(inputs, out, layout)
    return _read_back(out.detach(), layout, copy=True), token_of(recorded)


def _laid_out(x: Tensor, layout: RowLayout | None, *, copy: bool = False) -> Tensor:
    if layout is not None:
        return laid_out(x, layout)
    return x.clone() if copy else x


def _read_back(out: Tensor, layout: RowLayout | None, *, copy: bool = False) -> Tensor:
    if layout is not None:
        return read_back(out, layout)
    return out.clone(memory_format=torch.contiguous_format) if copy else out.contiguous()


@opaque_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attending: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    record: bool,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    return out, torch.empty(_BYTES, dtype=torch.uint8, device="cpu")


@torch.library.custom_op("lbr_ds::attend_backward", mutates_args=())
def _backward(slope: Tensor, recorded: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; key_heads: Hkv."""
    inputs, output, layout = value_of(recorded)
    if layout is not None:
        slope = gradient_of_read_back(slope, layout)
    grads = torch.autograd.grad(output, inputs, slope)
    query, key, value = (
        grad.contiguous() if layout is None else gradient_of_laid_out(grad, layout)
        for grad in grads
    )
    return query, key, value


@_backward.register_fake
def _(slope: Tensor, recorded: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, size = slope.shape
    key, value = (slope.new_empty(tokens, key_heads, size) for _ in range(2))
    return slope.new_empty(slope.shape), key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.key_heads = inputs[1].shape[1]


def _gradients(ctx: Any, slope: Tensor, _: None) -> tuple[Tensor | None, ...]:
    (recorded,) = ctx.saved_tensors
    return (*_backward(slope, recorded, ctx.key_heads), None, None, None, None, None)


opaque_attention.register_autograd(_gradients, setup_context=_save)
