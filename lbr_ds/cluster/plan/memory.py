"""Bytes on one rank, part by part: what stays from step to step, and what comes on top in a step.

What stays (parameters, gradients, the optimizer's weights and moments, the reduction bucket)
follows DeepSpeed 0.19.8's own buffers. A step has phases that do not overlap, so the peak is what
stays and the largest of them:

  head      all saved activations, and the head with its loss and gradient (stage 1)
  layers    all saved activations, one layer's backward, gradients under way, gathered parameters
  tables    the gradients of embeddings and head, which are whole for a moment
  optimizer one sub-group's gradients as the optimizer wants them

With activation checkpointing the saved activations are each layer's input, and one whole layer.
Under adapters (lora.rank) gradients, optimizer and tables' gradients are those of what learns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbr_ds.cluster.plan.shape import Shape
from lbr_ds.cluster.plan.work import Work
from lbr_ds.config.ds_config import Layout
from lbr_ds.model.head_chunk import head_chunk

_TILE = 1 << 20  # scores that the loss of stage 2 holds at a time (objectives/contrastive.py)

RESERVE = 2 << 30  # CUDA context, NCCL's channels, cuBLAS workspaces


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `stays` and `phases` lie on the GPU."""

    stays: dict[str, int]
    phases: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        """The most that the GPU's tensors take at once."""
        return sum(self.stays.values()) + max(self.phases.values())


def memory_of(
    shape: Shape, layout: Layout, work: Work, *, world: int, checkpointing: bool, gpu: bool = True
) -> Memory:
    """The memory of one rank of `world`.

    On CPU ranks the optimizer makes temporaries, two numbers each, attention runs in fp32, and Gloo
    and mixed sums copy (see `_moving`, `head`).
    """
    stays, host = _states(shape, layout, world)
    saved, layer = activations(shape, work, layout.width, checkpointing, layout.width if gpu else 4)
    # One rank holds all there is, and DeepSpeed then gathers nothing.
    gathered = live(shape, layout, checkpointing) * layout.width if world > 1 else 0
    moving = _moving(shape, layout, world, gpu)
    head_now, head_kept = head(shape, work, layout.width, gpu)
    contrast = vectors(shape, work, world)
    phases = {
        "head": gathered + saved + head_now,
        "layers": gathered + saved + layer + head_kept + contrast + moving,
        "tables": gathered + head_kept + contrast + _table(shape, layout, gpu, moving),
        "optimizer": _update(shape, layout, world, gpu),
    }
    return Memory(stays, phases, host)


def _states(shape: Shape, layout: Layout, world: int) -> tuple[dict[str, int], int]:
    """(what stays on the GPU, on the host)."""
    share, learning = shape.sharded(world), shape.learning_share(world)
    group = layout.group(world)
    if layout.stage < 3:
        whole = shape.total
        held = shape.learnt if layout.stage == 1 else 2 * learning
        buckets = 2 if layout.overlap else 1
        gpu = {
            "parameters": whole * layout.width,
            "gradients": held * layout.gradient_width,
            "reduction bucket": buckets * layout.reduce_bucket * layout.width,
        }
    else:
        whole = shape.persistent(layout.persistent)
        gpu = {
            "parameters": (share + whole) * layout.width,
            "gradients": learning * layout.gradient_width,
            "reduction bucket": layout.reduce_bucket * layout.width,
        }
        if layout.hpz > 1:
            gpu["second copy"] = shape.sharded(group, layout.persistent) * layout.width
    # Weights of the optimizer's own width have a copy all the same (seen on 0.19.8).
    gpu["optimizer"] = learning * (layout.master_width + 2 * layout.moment_width)
    host = 0
    if layout.stage == 3 and layout.offload_parameters:
        gpu["parameters"] -= share * layout.width
        host += share * layout.width
    if layout.offload_optimizer:
        # Gradients wait for the optimizer where it is, and once more as it wants them.
        waiting = gpu.pop("gradients") if layout.stage == 3 else 0
        host += waiting + gpu.pop("optimizer") + learning * layout.master_width
    return gpu, host


def live(shape: Shape, layout: Layout, checkpointing: bool) -> int:
    """Numbers of gathered parameters at once, beyond the persistent ones (0 below stage 3).

    A gathered parameter is let go after use unless it is used again within `reuse` numbers, so the
    last layers stay from forward to backward: each number of the way back counts once more, with
    checkpointing twice more. On top come what is prefetched and the module at work.
    """
    if layout.stage < 3:
        return 0
    module = max(math.prod(t) for t in shape.tensors)
    persistent = shape.persistent(layout.persistent)
    kept = layout.reuse // (3 if checkpointing else 2)
    if layout.by_layer(shape.per_layer):
        module = max(module, shape.per_layer)
    return min(shape.total - persistent, kept + layout.prefetch + module)


def activations(
    shape: Shape, work: Work, width: int, checkpointing: bool, attention_width: int
) -> tuple[int, int]:
    """(saved by a forward of a full micro-batch, on top while a layer goes backward)."""
    layer = layer_activations(shape, work, width, attention_width)
    tokens, hidden = work.micro_tokens, shape.hidden
    # The way back through the MLP holds the gradients of its three inner tensors.
    backward = tokens * (3 * shape.inner * width + 2 * hidden * 4)
    last = tokens * hidden * (4 + width) + 4 * tokens  # the last norm
    shared = 2 * tokens * shape.head_size * width  # rotary tables
    if checkpointing:
        return shape.layers * tokens * hidden * width + last + shared, layer + backward
    return shape.layers * layer + last + shared, backward


def layer_activations(shape: Shape, work: Work, width: int, attention_width: int) -> int:
    """Bytes that one decoder layer saves for its backward, over a full micro-batch.

    A norm saves its input in fp32 and its output before and after the gain. Attention saves q, k, v
    and its output (the bottleneck's rows twice) in its own width, the log-sums in fp32, and the
    input of its output projection; the MLP its four inner tensors.
    """
    tokens = work.micro_tokens
    rows = tokens + work.packed * work.copies
    q, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norm = tokens * shape.hidden * (4 + 2 * width) + 4 * tokens
    attention = rows * ((2 * q + 2 * kv) * attention_width + 4 * shape.heads)
    if work.copies:
        attention += tokens * q * width
    if shape.qk_norm:
        attention += tokens * (q + kv) * (4 + width)
    # What lies between the two matrices of each of a layer's adapters.
    attention += tokens * width * sum(rank for rank, _ in shape.adapters[::2]) // shape.layers
    return 2 * norm + attention + 4 * tokens * shape.inner * width


def head(shape: Shape, work: Work, width: int, gpu: bool = True) -> tuple[int, int]:
    """(in the head's forward, kept until its backward) for a full micro-batch of stage 1.

    The gradient of the head is made in the forward, in fp32, chunk by chunk (model/head.py).
    """
    rows = work.packed * work.supervised
    if not rows:
        return 0, 0
    states = rows * shape.hidden * width  # the rows that are read, and as large their gradient
    table = 0 if shape.adapters else shape.table  # a frozen head has no gradient
    kept = 2 * states + table * width
    half = width if width < 4 else 0
    chunk = head_chunk(rows, shape.hidden) * shape.vocab * (4 + half)
    # To add a chunk's share in bf16 to the sum in fp32 a CPU makes it fp32 first.
    widened = 0 if gpu or not half else 4
    return 2 * states + chunk + table * (4 + half + widened), kept


def vectors(shape: Shape, work: Work, world: int) -> int:
    """Stage 2: fp32 vectors of the whole step, their gradients, and the scores.

    Own vectors three times (pieces, joined, gradient), the gathered candidates twice, and for each
    pair of a tile (objectives/contrastive.py) five fp32 numbers and two booleans.
    """
    if not work.queries:
        return 0
    own = work.queries + work.candidates
    everyone = work.candidates * world
    held = 3 * own + 2 * everyone if work.cached else own + 2 * everyone
    pairs = min(work.queries * everyone, max(_TILE, everyone))
    return held * shape.hidden * 4 + pairs * 22


def _table(shape: Shape, layout: Layout, gpu: bool, moving: int) -> int:
    """The gradient of a table and what is under way with it.

    One that no bucket holds is reduced where it lies, after the bucket's contents.
    """
    if shape.adapters:
        return moving
    size = shape.table * layout.width
    if layout.stage == 3 and shape.table > layout.reduce_bucket:
        return size if gpu else 2 * size
    return size + moving


def _moving(shape: Shape, layout: Layout, world: int, gpu: bool) -> int:
    """Gradients under way: the bucket's copy in the order of ranks, and its reduced part.

    Gloo reduce-scatters in one more copy of its input.
    """
    bucket = min(layout.reduce_bucket, shape.learnt)
    if layout.stage < 3:
        return bucket * layout.width
    # A layer that is gathered as one keeps its gradients until its end.
    waiting = shape.per_layer if layout.by_layer(shape.per_layer) else 0
    copies = 1 if gpu else 2
    return (copies * bucket + bucket // world + waiting) * layout.width


def _update(shape: Shape, layout: Layout, world: int, gpu: bool) -> int:
    """What the optimizer adds: a sub-group's gradients in its own width, and temporaries."""
    if layout.offload_optimizer:
        return 0
    group = _group(shape, layout, world)
    once = group * layout.master_width
    if layout.gradient_width != layout.master_width:
        once += group * layout.gradient_width
    return once if gpu else once + 2 * group * layout.master_width


def _group(shape: Shape, layout: Layout, world: int) -> int:
    """Numbers of a rank's largest optimizer sub-group. Decayed weights and others are apart."""
    largest = max(shape.decayed, shape.learnt - shape.decayed) // world
    return min(largest, layout.sub_group) if layout.stage == 3 else largest
