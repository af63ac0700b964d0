"""Adapters: what is merged computes what was trained, and only what should learn does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lbr_ds.batching import Sequence, pack
from lbr_ds.config import BottleneckConfig, LoraConfig, ModelConfig
from lbr_ds.errors import ConfigError
from lbr_ds.model.bottleneck import bottleneck_ids, prepare_backbone
from lbr_ds.model.embedder import Embedder, build_embedder
from lbr_ds.model.lora import adapt, parts
from tests.tiny import backbone

LORA = LoraConfig(rank=3, alpha=6)
SCALE = 2.0


def prepared(folder: Path, count: int = 2, **shape: object) -> Path:
    """A prepared backbone with drawn weights."""
    model = ModelConfig(backbone=str(backbone(folder / "raw", **shape)), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=count), folder / "model", 0)
    return folder / "model"


def drawn(folder: Path, *, checkpointing: bool = False) -> Embedder:
    """The module with drawn weights, the same every time."""
    model = build_embedder(
        folder, torch.float32, activation_checkpointing=checkpointing, trust_remote_code=False
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def learn(model: Embedder, folder: Path) -> Tensor:
    """A loss of both stages' forwards; its gradients are made."""
    new = bottleneck_ids(folder) or [1, 1]
    told = [Sequence([*range(5, 20), *new], 2, [4, 5, 6]), Sequence([7, 8, *new], 2, [8, 9])]
    read = [Sequence([*range(3, 12), *new], 2), Sequence([9, *new], 2)]
    vectors = model(pack(read))
    loss = model(pack(told)) + (vectors[0] * vectors[1]).sum() * 3
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [2, 0])
def test_equals_the_merged_model(
    tmp_path: Path, tied: bool, count: int, checkpointing: bool
) -> None:
    """Loss, and gradients by the chain rule from those of the merged weights, in plain torch."""
    folder = prepared(tmp_path, count, tie_word_embeddings=tied)
    model = drawn(folder, checkpointing=checkpointing)
    new = bottleneck_ids(folder)
    adapt(model, lora=LORA, new=new)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "rows" in name:
                parameter.normal_(std=0.2)
    found = learn(model, folder)

    plain = drawn(folder)
    merged = {name: make() for name, _, make in parts(model)}
    own = dict(plain.backbone.named_parameters())
    assert merged.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(merged[name])
    torch.testing.assert_close(found, learn(plain, folder), rtol=1e-5, atol=1e-5)

    seen = 0
    for name, layer in model.backbone.named_modules():
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            slope = own[f"{name}.weight"].grad * SCALE
            torch.testing.assert_close(down.grad, up.T @ slope, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(up.grad, slope @ down.T, rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == 2 * 7
    if count:
        slope = plain.backbone.get_input_embeddings().weight.grad[new]
        torch.testing.assert_close(model.rows.difference.grad, slope, rtol=1e-4, atol=1e-5)


def test_nothing_changes_at_first_and_little_learns(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    model, plain = drawn(folder), drawn(folder)
    adapt(model, lora=LoraConfig(rank=2, targets=("v_proj", "up_proj")), new=bottleneck_ids(folder))
    assert learn(model, folder) == learn(plain, folder)
    learning = {n for n, p in model.named_parameters() if p.grad is not None}
    assert learning == {n for n, p in model.named_parameters() if p.requires_grad}
    inside = "backbone.model.layers.{}.{}.lora_{}.default.weight"
    assert learning == {"rows.difference"} | {
        inside.format(layer, at, part)
        for layer in (0, 1)
        for at in ("self_attn.v_proj", "mlp.up_proj")
        for part in "AB"
    }


def test_unknown_target_is_one_line(tmp_path: Path) -> None:
    model = drawn(prepared(tmp_path))
    with pytest.raises(ConfigError, match=r"^lora\.targets: 'q_prj' is not a linear") as caught:
        adapt(model, lora=LoraConfig(rank=2, targets=("q_proj", "q_prj")), new=[])
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in str(caught.value)
    assert "\n" not in str(caught.value)
