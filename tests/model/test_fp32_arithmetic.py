"""fp32 arithmetic on bf16 weights: the oracle is the model in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel

from lbr_ds.model.fp32_arithmetic import use_fp32_arithmetic
from tests.tiny import backbone


def test_equals_the_model_in_fp32(tmp_path: Path) -> None:
    folder = backbone(tmp_path)
    ids = torch.arange(24).reshape(2, 12)
    narrow = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    wide = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).float()
    before = narrow(ids).last_hidden_state
    use_fp32_arithmetic(narrow)
    found = narrow(ids).last_hidden_state
    assert found.dtype == torch.float32
    assert torch.equal(found, wide(ids).last_hidden_state)
    assert not torch.equal(found, before.float())
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
