"""In the last decoder layer, compute queries, output projection and MLP of the read rows only.

Keys and values of every row are needed there, but the output of a row that nobody reads is thrown
away: in stage 2 and in encoding all rows but one a text, in stage 1 those of X. That is most of one
layer of work in every forward and backward. No model code is copied: hooks on the last layer's
modules take the read rows out of the input and put the result back among zeros, so the layer's own
code sees the shapes that it expects. The output of rows that are not read is undefined.

A backbone whose modules have other names, or whose MLP returns more than a tensor, computes all
rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_IN_ATTENTION = ("q_proj", "o_proj")


def compute_read_rows_only(body: nn.Module) -> None:
    """Add hooks to the last of `body.layers`, so that `read=rows` computes these rows only.

    rows (R,) int64, distinct, are a keyword argument of the layer's attention, which activation
    checkpointing also passes to its second forward.
    """
    layers: Any = getattr(body, "layers", None)
    last: Any = layers[-1] if isinstance(layers, nn.ModuleList) else None
    attention, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    if not (isinstance(attention, nn.Module) and hasattr(mlp, "down_proj")):
        return
    hooks = _Hooks()
    attention.register_forward_pre_hook(hooks.begin, with_kwargs=True)
    for module in (*(getattr(attention, name, None) for name in _IN_ATTENTION), mlp):
        if module is not None:
            module.register_forward_pre_hook(hooks.take)
            module.register_forward_hook(hooks.put)


class _Hooks:
    """`begin` runs before the attention, `take` and `put` around each module that works by rows."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.length = 0

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows = kwargs.get("read")

    def take(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Take the read rows: (1, T, D) -> (1, R, D)."""
        if self.rows is None:
            return None
        self.length = args[0].shape[1]
        return (args[0][0].index_select(0, self.rows)[None],)

    def put(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Put them back among zeros: (1, R, D) -> (1, T, D)."""
        if self.rows is None:
            return None
        whole = output.new_zeros(self.length, output.shape[-1])
        return whole.index_copy(0, self.rows, output[0])[None]
