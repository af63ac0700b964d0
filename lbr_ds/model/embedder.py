"""The one forward that the engine calls: a packed batch in, a loss or vectors out.

Both stages use the same module; which of the two comes out follows from the batch: rows with
targets give the next-token loss, rows without give the sequences' vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from lbr_ds.batching import PackedBatch
from lbr_ds.model.attention import packed_forward, use_ib_attention
from lbr_ds.model.attention_costs import Kernels
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.head import Head
from lbr_ds.model.last_layer import compute_read_rows_only

_WORTH = 0.8  # taking rows out of a layer and putting them back costs about a tenth of its work


class Embedder(nn.Module):
    """A causal LM that is read at its bottleneck.

    Attributes:
        backbone: the causal LM; only its `base_model` runs.
        head: the losses of stage 1; it holds the weight of the LM's head.
        rows: the trained difference of the bottleneck's rows where the backbone is frozen
            (model/lora.py); else None.
        pooling: last (the last bottleneck token) or mean.
        bidirectional: whether rows of a text see the whole text in stage 2.
        kernels: the attention kernels to choose from; None: see `packed_forward`.
    """

    rows: nn.Module | None
    kernels: Kernels | None = None

    def __init__(self, backbone: PreTrainedModel, card: Card) -> None:
        super().__init__()
        use_ib_attention(backbone)
        self.backbone = backbone
        self.register_module("rows", None)  # before the head, which may share its parameter
        self.head = Head(backbone.get_output_embeddings().weight)
        self.pooling = card.pooling
        self.bidirectional = card.attention == "bidirectional"
        compute_read_rows_only(backbone.base_model)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return losses or vectors, depending on the batch.

        Returns:
            With targets the sum of the rows' losses, an fp32 scalar, or what `Head` returns.
            Without targets (N, D) fp32 of unit length, one vector for each sequence.
        """
        hidden = self._body(batch, read=self._read(batch)).last_hidden_state[0]
        if batch.targets is not None:
            return self.head(hidden[batch.read], batch.targets, batch.bags, batch.kinds)
        if self.pooling == "mean":
            pooled = _means(hidden.float(), batch)
        else:
            pooled = hidden[batch.read].float()
        return normalize(pooled, dim=-1)

    def states(self, batch: PackedBatch) -> Tensor:
        """Return each layer's input and the last one's normed output: (layers + 1, T, D) fp32."""
        layers = self._body(batch, read=None, output_hidden_states=True).hidden_states
        return torch.stack([layer[0].float() for layer in layers])

    def _body(self, batch: PackedBatch, **more: Any) -> Any:
        # A target must never see what it predicts.
        bidirectional = self.bidirectional and batch.targets is None
        more |= {"bidirectional": bidirectional, "kernels": self.kernels}
        return packed_forward(self.backbone, batch, **more)

    def _read(self, batch: PackedBatch) -> Tensor | None:
        """Return the rows whose final state is read; None: (nearly) all of them."""
        if self.pooling == "mean" and batch.targets is None:
            return None
        return batch.read if len(batch.read) <= _WORTH * batch.num_tokens else None


def _means(states: Tensor, batch: PackedBatch) -> Tensor:
    """Return (N, D), the mean of each sequence's rows of states (T, D) without unpooled ones."""
    lengths = batch.starts.diff()
    numbers = torch.arange(len(lengths), device=states.device)
    # Without output_size torch would wait for the device to know the sum of the lengths.
    owner = numbers.repeat_interleave(lengths, output_size=len(states))
    if batch.unpooled is not None:
        inside = torch.arange(len(states), device=states.device) - batch.starts[owner]
        states = states * (inside >= batch.unpooled[owner])[:, None]
        lengths = lengths - batch.unpooled
    sums = states.new_zeros(len(lengths), states.shape[1])
    return sums.index_add(0, owner, states) / lengths[:, None]


def build_embedder(
    folder: Path,
    dtype: torch.dtype,
    *,
    activation_checkpointing: bool,
    trust_remote_code: bool,
) -> Embedder:
    """Build the module with the shape of a prepared folder; its weights are *not* loaded here.

    Called inside the engine's context, where parameters are sharded as they are made: an
    initialisation would then write into empty shards, so there is none.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with no_init_weights():
        backbone = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    backbone.tie_weights()
    if activation_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.train()
    return Embedder(backbone, Card.load(folder))
