"""How many rows of logits the language-model head holds at a time. Torch-free, for the planner."""

from __future__ import annotations

import math

_GPU_LOGITS = 1 << 30  # bytes of logits at a time on a GPU
_CPU_ROWS = 256, 1024  # the fewest and the most on a CPU
_GPU_BLOCK, _CPU_BLOCK = 128 << 20, 4 << 20  # bytes of fp32 that bf16 logits are widened to at once


def head_chunk(rows: int, hidden: int, vocab: int, width: int, *, gpu: bool) -> int:
    """Return the number of rows whose logits are computed at once.

    Each chunk beyond the first reads and writes the weight's gradient once more in fp32. On a GPU
    1 GiB of logits is enough that this costs little beside the products. On a CPU chunks that stay
    in its cache are fastest, and half of the hidden size is enough. All chunks are of one size, or
    nearly.

    Args:
        rows: rows of hidden states with a loss.
        hidden: the model's hidden size.
        vocab: rows of the weight.
        width: bytes of a number of the weight, and so of a logit.
        gpu: whether the head runs on a GPU.
    """
    if gpu:
        most = max(_GPU_LOGITS // (vocab * width), 1)
    else:
        fewest, limit = _CPU_ROWS
        most = min(max(hidden // 2, fewest), limit)
    return math.ceil(rows / math.ceil(rows / most)) if rows else 1


def head_block(vocab: int, gpu: bool) -> int:
    """Return the number of rows of bf16 logits that are widened to fp32 at once.

    Few enough to stay in a CPU's cache; on a GPU enough that starting kernels costs little.
    """
    return max((_GPU_BLOCK if gpu else _CPU_BLOCK) // (4 * vocab), 1)
