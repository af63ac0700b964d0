"""Low-rank adapters (LoRA, arXiv 2106.09685) over a frozen backbone. The only door for peft.

Trainable are the adapters, which peft adds to the linear layers, and the rows of the bottleneck
tokens: they are new, so freezing them would freeze noise. peft's way to train rows
(`trainable_token_indices`) copies the whole table in every forward and reads a weight that another
module owns, which under ZeRO-3 is an empty shard. Here a small module of its own adds a difference,
zero at first, to what the table gives for those tokens; a tied head adds it too (model/head.py).

Checkpoints' models and exports are merged: `parts` returns the parameters of each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from lbr_ds.config import LoraConfig, RunConfig
from lbr_ds.errors import ConfigError
from lbr_ds.model.bottleneck import bottleneck_ids
from lbr_ds.model.embedder import Embedder

_ADAPTER = "default"  # peft's own name for it


class NewRows(nn.Module):
    """Trainable `difference` (K, D) of the rows `ids` (K,) of a table; zero at first."""

    place: Tensor

    def __init__(self, table: nn.Embedding, ids: list[int]) -> None:
        super().__init__()
        device = table.weight.device
        self.difference = nn.Parameter(
            torch.zeros(len(ids), table.embedding_dim, dtype=table.weight.dtype, device=device)
        )
        place = torch.full((table.num_embeddings,), len(ids), device=device)
        place[ids] = torch.arange(len(ids), device=device)
        self.register_buffer("place", place, persistent=False)  # of an id; K: not among them

    def forward(self, ids: Tensor, found: Tensor) -> Tensor:
        """Add the difference to `found` (..., D), the table's rows of `ids` (...)."""
        none = self.difference.new_zeros(1, self.difference.shape[1])
        rows = torch.cat([self.difference, none])
        return found + embedding(self.place[ids], rows, padding_idx=len(self.difference))


def adapting(run: RunConfig, folder: Path) -> Callable[[Embedder], None] | None:
    """Return `adapt` with the recipe's settings; None if the recipe trains all parameters."""
    if run.lora.rank is None:
        return None
    import_module("peft")  # slow and large: here, and not amid what is timed or measured
    return partial(adapt, lora=run.lora, new=bottleneck_ids(folder))


def adapt(model: Embedder, *, lora: LoraConfig, new: list[int]) -> None:
    """Freeze the backbone and add adapters; new: ids of the bottleneck tokens.

    The outputs of the model do not change yet. Under ZeRO-3 it must be called outside of zero.Init,
    because the adapters are initialised here, alike on every rank.

    Raises:
        ConfigError: No linear layer has a name of `lora.targets`.
    """
    import peft  # of no use to full training

    backbone: Any = model.backbone
    _check(lora, backbone)
    backbone.requires_grad_(False)
    options: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets) or "all-linear",
    }
    peft.inject_adapter_in_model(peft.LoraConfig(**options), backbone, _ADAPTER)
    if not new:
        return
    table, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    model.rows = rows = NewRows(table, new)
    table.register_forward_hook(lambda module, args, found: rows(args[0], found))
    if head.weight is table.weight:
        model.head.add_rows(rows.difference, torch.tensor(new, device=table.weight.device))


def _check(lora: LoraConfig, backbone: nn.Module) -> None:
    linear = {
        name.rpartition(".")[2]: None
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's
    }
    for name in lora.targets:
        if name not in linear:
            raise ConfigError(
                f"lora.targets: {name!r} is not a linear layer of the backbone; choose from "
                f"{', '.join(linear)}"
            )


def parts(model: Embedder) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], Tensor]]]:
    """Yield (name, parameters, make) for each of the backbone's own weights, adapted or not.

    Names are those of `from_pretrained`. For an adapted weight the first parameter is the weight as
    it was before training. make() returns the current weight in the same dtype, merged in fp32; it
    may be called while all the parameters are gathered.
    """
    over = dict(_adapted(model))
    for name, parameter in model.backbone.named_parameters():
        if ".lora_" not in name:
            plain = ([parameter], parameter.detach)
            parameters, make = over.get(id(parameter), plain)
            yield name.replace(".base_layer.", "."), parameters, make


def _adapted(model: Embedder) -> Iterator[tuple[int, tuple[list[nn.Parameter], Any]]]:
    layers: Any = model.modules()
    for layer in layers:
        if hasattr(layer, "lora_A"):
            weight, scale = layer.base_layer.weight, layer.scaling[_ADAPTER]
            down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            make = partial(_with_product, weight, down, up, scale, layer.fan_in_fan_out)
            yield id(weight), ([weight, down, up], make)
    rows: Any = model.rows
    if rows is not None:
        table: Any = model.backbone.get_input_embeddings()
        make = partial(_with_rows, table.weight, rows)
        yield id(table.weight), ([table.weight, rows.difference], make)


@torch.no_grad()
def _with_product(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, transposed: bool
) -> Tensor:
    product = up.float() @ down.float() * scale
    return (weight.float() + (product.T if transposed else product)).to(weight.dtype)


@torch.no_grad()
def _with_rows(table: Tensor, rows: NewRows) -> Tensor:
    merged = table.clone()
    at = (rows.place < len(rows.difference)).nonzero()[:, 0]
    merged[at] = (table[at].float() + rows.difference[rows.place[at]].float()).to(table.dtype)
    return merged
