"""Contexts -> the answers that the model writes greedily, in batches, with a key-value cache.

1. The contexts go through the trainer's own forward, packed, and leave their keys and values.
2. Of those, an answer keeps what it may see: of a cut sequence (the bottleneck) only B's rows, so X
   cannot reach it by any way but B; of any other all rows. Rows of unequal number are filled up on
   the left and masked.
3. Then one token a forward for the whole batch, each at its own position, until all have ended.

Tests hold this equal to plain greedy decoding: the whole packed sequence again for every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lbr_ds.batching import Sequence, pack
from lbr_ds.model.attention import NAME, packed_forward
from lbr_ds.model.packed_encoder import PackedEncoder


@torch.no_grad()
def write(
    model: PackedEncoder, contexts: list[Sequence], limit: int, batch_tokens: int = 16384
) -> list[list[int]]:
    """Return the ids that follow each context without the end token, at most `limit`.

    contexts: sequences without target; `cut` says what the answer sees, as in training.
    batch_tokens: cached rows of one batch.
    """
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    rows = max(1, batch_tokens // (len(contexts[order[-1]]) + limit)) if order else 1
    written: list[list[int]] = [[] for _ in contexts]
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        for i, ids in zip(
            chosen, _write_batch(model, [contexts[i] for i in chosen], limit), strict=True
        ):
            written[i] = ids
    return written


def _write_batch(model: PackedEncoder, contexts: list[Sequence], limit: int) -> list[list[int]]:
    backbone, end = model.model.backbone, model.tokenizer.backend.eos_token_id
    last, cache, visible = _read(model, contexts)
    positions = torch.tensor([[len(c)] for c in contexts], device=model.device)
    written = torch.empty((len(contexts), 0), dtype=torch.int64, device=model.device)
    backbone.set_attn_implementation("sdpa")
    try:
        while True:
            chosen = (last @ model.model.head.weight.T).argmax(-1, keepdim=True)
            written = torch.cat([written, chosen], 1)
            if written.shape[1] == limit or bool((written == end).any(1).all()):
                break
            visible = torch.cat([visible, torch.ones_like(chosen)], 1)
            last = backbone.base_model(
                input_ids=chosen,
                position_ids=positions,
                attention_mask=visible,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, 0]
            positions = positions + 1
    finally:
        backbone.set_attn_implementation(NAME)
    return [ids[: ids.index(end)] if end in ids else ids for ids in written.tolist()]


def _read(model: PackedEncoder, contexts: list[Sequence]) -> tuple[Tensor, DynamicCache, Tensor]:
    """Return the last states (n, D), the cache that answers may see, and its mask (n, L)."""
    backbone: PreTrainedModel = model.model.backbone
    batch = pack(contexts).to(model.device)
    packed = DynamicCache()
    hidden = packed_forward(
        backbone, batch, use_cache=True, past_key_values=packed
    ).last_hidden_state[0]
    seen = torch.tensor([c.num_bottleneck if c.cut else len(c) for c in contexts]).to(model.device)
    width = int(seen.max())
    ends = batch.starts[1:, None]
    rows = ends - width + torch.arange(width, device=model.device)  # (n, L), filled on the left
    visible = (rows >= ends - seen[:, None]).long()
    rows = rows.clamp(min=0)
    cache = DynamicCache()
    layers: Any = packed.layers
    for index, layer in enumerate(layers):
        keys, values = (x[0][:, rows].transpose(0, 1) for x in (layer.keys, layer.values))
        cache.update(keys, values, index)  # (n, Hkv, L, d)
    return hidden[batch.read], cache, visible
