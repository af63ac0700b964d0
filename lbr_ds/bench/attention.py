"""IB attention alone: packed segments against one dense mask, forward and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lbr_ds.batching import PackedBatch, Sequence, pack
from lbr_ds.cluster.device import clock
from lbr_ds.model.attention import segment_attention
from lbr_ds.model.attention_calibration import Heads, calibrate

Operands = tuple[Tensor, Tensor, Tensor]


def operands(tokens: int, config: dict[str, Any], device: str, dtype: torch.dtype) -> Operands:
    """Return random query (1, H, T, d), key and value (1, Hkv, T, d), which need gradients."""
    size = config["hidden_size"] // config["num_attention_heads"]
    query, key, value = (
        torch.randn(1, tokens, config[heads], size, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    )
    return query, key, value


def seconds(tensors: Operands, attend: Callable[[], Tensor]) -> Callable[[], float]:
    """Return a function that times the forward and the gradients of all three."""

    def run() -> float:
        begin = clock()
        torch.autograd.grad(attend().sum(), tensors)
        return clock() - begin

    return run


def by_segments(
    sequences: list[Sequence],
    config: dict[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[[], float]:
    """Return a function that times attention by segments on the packed batch.

    The kernel is the one that a model chooses for such a batch on this device.
    """
    batch = pack(sequences).to(torch.device(device))
    tensors = operands(batch.num_tokens, config, device, dtype)
    kernel = kernel_for(batch, config, device, dtype)
    module = nn.Module()

    def attend() -> Tensor:
        return segment_attention(module, *tensors, None, segments=batch.segments, kernel=kernel)[0]

    return seconds(tensors, attend)


def kernel_for(batch: PackedBatch, config: dict[str, Any], device: str, dtype: torch.dtype) -> str:
    """Return the name of the attention kernel that is chosen for a batch on a device."""
    queries = config["num_attention_heads"]
    heads = Heads(queries, config["num_key_value_heads"], config["hidden_size"] // queries)
    return calibrate(torch.device(device), dtype, heads).choose(batch.segments, heads.width)


def by_mask(
    sequence: Sequence,
    config: dict[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Callable[[], float]:
    """Return a function that times a dense mask, with keys repeated as in transformers."""
    mask = dense_ib_mask(sequence).to(device)[None, None]
    tensors = operands(len(sequence), config, device, dtype)
    share = config["num_attention_heads"] // config["num_key_value_heads"]

    def attend() -> Tensor:
        query, *rest = tensors
        key, value = (x.repeat_interleave(share, 1) for x in rest)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return seconds(tensors, attend)


def dense_ib_mask(sequence: Sequence) -> Tensor:
    """Return the mask (T, T) of a sequence, true where a row attends to a column."""
    mask = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
    context = len(sequence.context)
    mask[context:, : context - sequence.num_bottleneck] = False
    return mask
