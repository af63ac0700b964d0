"""fp32 arithmetic on weights that stay in bf16: a large model without a second copy in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def use_fp32_arithmetic(model: nn.Module) -> None:
    """Convert a module's own parameters to fp32 while it runs, and keep them as stored otherwise.

    Results equal those of `model.float()` bit for bit. The additional memory is that of the largest
    tensor; of the embedding table only the rows that are looked up are converted.
    """
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.dtype != torch.float32]
        if own and isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.float())
        elif own:
            hooks = _Hooks(own)
            module.register_forward_pre_hook(hooks.before)
            module.register_forward_hook(hooks.after)


class _Hooks:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.stored = [p.data for p in parameters]

    def before(self, module: nn.Module, args: Any) -> None:
        for parameter, stored in zip(self.parameters, self.stored, strict=True):
            parameter.data = stored.float()

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        for parameter, stored in zip(self.parameters, self.stored, strict=True):
            parameter.data = stored
