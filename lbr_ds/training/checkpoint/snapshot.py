"""Copy nested state to host memory, so that training waits for the copy only."""

from __future__ import annotations

from enum import Enum
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """Host buffers that are reused for every snapshot.

    Allocating memory costs more than copying into it (page faults on a CPU, pinning for a GPU), so
    the buffers are kept: a rank holds a second copy of its share of the engine's state.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, state: Any) -> Any:
        """Return a copy of `state`; the copy returned before for the same name is overwritten.

        Args:
            name: Name of the state.
            state: Tensors in dicts, lists and tuples.
        """
        copied = self._copy(name, state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, name: str, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._fill(name, item.detach())
        if isinstance(item, dict):
            return type(item)((k, self._copy(f"{name}/{k}", v)) for k, v in item.items())
        if type(item) in (list, tuple):
            return type(item)(self._copy(f"{name}/{i}", v) for i, v in enumerate(item))
        return item

    def _fill(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.is_cuda
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def _member(kind: Any, name: str) -> Any:
    if not issubclass(kind, Enum):
        raise UnpicklingError(f"{kind.__name__} is not an enum, so {name} of it is not read")
    return kind[name]


# For torch.serialization.safe_globals: Python before 3.11.4 pickles a member of an enum as getattr
# of its class. That of anything else is refused.
ENUM_MEMBER = (_member, "builtins.getattr")
