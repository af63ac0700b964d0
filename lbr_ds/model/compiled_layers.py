"""Compile each decoder layer on its own.

All layers run one compiled function, with their parameters as inputs, so the number of graphs does
not grow with the number of layers; sizes are dynamic and attention is an operator of its own
(`opaque_attention.py`), so it does not grow with the batches either. The layer's `forward` is
compiled and not its `__call__`: hooks on the layer, such as those of ZeRO-3, and activation
checkpointing stay outside of the graph.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from lbr_ds.errors import short

log = logging.getLogger(__name__)

_GRAPHS = 64  # of one function at most: with and without gradients, the last layer, each model


class LayerCompiler:
    """The compiled forward of all layers of a model, or the eager one where that fails.

    Attributes:
        active: whether layers run compiled.
        graphs: how many graphs were compiled, forward and backward counted as one.
    """

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        config.specialize_float = True  # such as epsilons; else they are inputs of the graph
        functorch: Any = torch._functorch.config
        # A saved view of a weight would keep a gathered parameter of ZeRO-3 alive; and a backward
        # that is compiled with the forward fails there, and not in the middle of a step.
        for option in ("recompute_views", "force_non_lazy_backward_lowering"):
            if hasattr(functorch, option):  # not in every version of torch
                setattr(functorch, option, True)
        self.active, self.graphs, self._announced = True, 0, False
        self._compiled = torch.compile(_forward, dynamic=True, fullgraph=True, backend=backend)

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a layer's forward."""
        if not self.active:
            return _forward(layer, args, kwargs)
        if not self._announced:
            self._announced = True
            log.info(
                "compiling the decoder layers (once; cached in %s for later starts)", cache_dir()
            )
        known, began = _compiled_graphs(), time.perf_counter()
        try:
            out = self._compiled(layer, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.active = False
            log.warning(
                "model.compile: %s cannot be compiled, so layers run eagerly: %s",
                type(layer).__name__,
                short(str(error)),
            )
            return _forward(layer, args, kwargs)
        if _compiled_graphs() > known:
            self.graphs += 1
            seconds = time.perf_counter() - began
            name = type(layer).__name__
            log.info("compiled %s in %.0f s (graph %d)", name, seconds, self.graphs)
        return out


def _compiled_graphs() -> int:
    stats: Any = torch._dynamo.utils.counters["stats"]
    count: int = stats["unique_graphs"]
    return count


def _forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def compile_layers(
    body: nn.Module, backend: str | Callable[..., Any] = "inductor"
) -> LayerCompiler | None:
    """Compile the decoder layers of a transformers model.

    Args:
        body: the model without its head.
        backend: of torch.compile.

    Returns:
        What runs the layers; None where the body has no list of `layers`.
    """
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        log.warning("model.compile: %s has no list of layers; it runs eagerly", type(body).__name__)
        return None
    compiler = LayerCompiler(backend)
    for layer in layers:
        layer.forward = _outside(layer, compiler.run, narrow=layer is layers[-1])
    return compiler


def _outside(layer: Any, run: Callable[..., Any], *, narrow: bool) -> Callable[..., Any]:
    """Return the layer's forward with activation checkpointing outside of what is compiled.

    Arguments are made alike, because a graph is compiled for each kind of them. `read` is passed
    only where the hooks of model/last_layer.py use it: torch does not check whether a module has
    the hooks that it had when it was compiled (dynamo's skip_nnmodule_hook_guards), so it is also
    what gives the last layer a graph of its own.
    """
    checkpoint = None
    if getattr(layer, "gradient_checkpointing", False):
        checkpoint = layer._gradient_checkpointing_func
        layer.gradient_checkpointing = False  # transformers would checkpoint inside

    def forward(hidden: Tensor, *args: Any, read: Tensor | None = None, **kwargs: Any) -> Any:
        if narrow and read is not None:
            kwargs["read"] = read
            if len(read) == 1:  # torch.compile does not take a size of 1 for a size that varies
                return _forward(layer, (hidden, *args), kwargs)
        if not torch.is_grad_enabled():
            hidden = hidden.detach()  # transformers lets embeddings require gradients all the same
        elif checkpoint is not None and layer.training:
            return checkpoint(functools.partial(run, layer, **kwargs), hidden, *args)
        return run(layer, hidden, *args, **kwargs)

    return forward
