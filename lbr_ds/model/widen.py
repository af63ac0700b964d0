"""fp32 arithmetic on weights that stay in bf16: a large model judged without a second copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def widen(model: nn.Module) -> None:
    """From now on a module's own parameters are fp32 while it runs, and as stored otherwise.

    The numbers are those of `model.float()`, to the bit; what is needed on top is the largest
    tensor but the embedding table, of which only the rows asked for are widened.
    """
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.dtype != torch.float32]
        if own and isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, found: found.float())
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
