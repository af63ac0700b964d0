"""Measure the attention kernels of a device, once, for the cost rule (`attention_costs.py`)."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lbr_ds.batching import Sequence, pack
from lbr_ds.errors import ConfigError, short
from lbr_ds.model.attention_costs import RECTANGLES, VARLEN, Cost, Kernels, fit, work_of
from lbr_ds.model.attention_kernels import attend

log = logging.getLogger(__name__)

# Lengths of the segments that are timed: mostly pairs, mostly rows, mostly calls.
_TIMED = ([4096], [64] * 64, list(range(64, 576, 32)))
_ROUNDS, _WARM_UP = 5, 2


class Heads(NamedTuple):
    """The shape of a model's attention.

    Attributes:
        queries: heads of the queries.
        keys: heads of keys and values.
        size: elements of a head.
    """

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Heads:
        """Read them from a config.json."""
        text = config.get_text_config()
        queries = text.num_attention_heads
        keys = getattr(text, "num_key_value_heads", None) or queries
        return cls(queries, keys, getattr(text, "head_dim", None) or text.hidden_size // queries)

    @property
    def width(self) -> int:
        """Heads x head size of the queries."""
        return self.queries * self.size


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record, also where the caller has switched it off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@functools.cache
def calibrate(
    device: torch.device, dtype: torch.dtype, heads: Heads, wanted: str = "auto"
) -> Kernels:
    """Return the kernels that can be used for such tensors, measured where there is a choice.

    Args:
        device: where the tensors are.
        dtype: of the tensors.
        heads: their heads.
        wanted: a kernel's name, to use it alone; it must exist for such tensors.

    Raises:
        ConfigError: `wanted` cannot be used here.
    """
    names = [RECTANGLES]
    if wanted != RECTANGLES and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        names += [VARLEN] * agrees(VARLEN, device, dtype, heads)
    if wanted != "auto":
        if wanted not in names:
            raise ConfigError(
                f"model.attention_kernel={wanted} cannot be used for {dtype} on {device}; use auto"
            )
        names = [wanted]
    if len(names) == 1:
        return Kernels({names[0]: Cost(0, 0, 0)})
    kernels = Kernels({name: measure(name, device, dtype, heads) for name in names})
    log.info("attention on %s: %s", device, kernels)
    return kernels


@_recording()
def measure(name: str, device: torch.device, dtype: torch.dtype, heads: Heads) -> Cost:
    """Time one kernel, forward and all gradients, and fit its cost."""
    found = []
    for lengths in _TIMED:
        batch = pack([Sequence([0] * length, 0) for length in lengths]).to(device)
        segments = batch.segments
        q, k, v = random_heads(sum(lengths), device, dtype, heads)
        seconds = []
        for _ in range(_WARM_UP + _ROUNDS):
            _wait(device)
            begin = perf_counter()
            out = attend(q, k, v, segments, name, causal=True, scale=None)
            torch.autograd.grad(out, (q, k, v), out.detach())
            _wait(device)
            seconds.append(perf_counter() - begin)
        work = work_of(name, segments, heads.width)
        found.append((work, median(seconds[_WARM_UP:])))
    return fit(found)


def random_heads(
    tokens: int, device: torch.device, dtype: torch.dtype, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries (T, H, d), keys and values (T, Hkv, d), which need gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, count, heads.size, generator=generator)
        .to(device, dtype)
        .requires_grad_()
        for count in (heads.queries, heads.keys, heads.keys)
    )
    return q, k, v


@_recording()
def agrees(name: str, device: torch.device, dtype: torch.dtype, heads: Heads) -> bool:
    """Compare values and gradients of a kernel with those of `rectangles` on a small cut batch."""
    batch = pack([Sequence([0] * 9, 2, [0] * 7), Sequence([0] * 5, 2, [0] * 12)]).to(device)
    results = []
    q, k, v = random_heads(batch.num_tokens, device, dtype, heads)
    for kernel in (RECTANGLES, name):
        try:
            out = attend(q, k, v, batch.segments, kernel, causal=True, scale=None)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        except Exception as error:  # a driver fails in ways of its own
            log.warning("%s attention is not usable here: %s", kernel, short(error))
            return False
    agree = all(torch.allclose(a, b, atol=0.05, rtol=0.05) for a, b in zip(*results, strict=True))
    if not agree:
        log.warning("%s attention failed its self-test and is not used", name)
    return agree


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
