"""Predict the memory of one rank: the states between steps, and what a step adds to them.

The states (parameters, gradients, optimizer weights and moments, the reduction bucket) follow the
buffers of DeepSpeed 0.19.8. A step has phases that do not overlap, so the peak is the states plus
the largest phase:

  head      all saved activations, and the head with its loss and gradient (stage 1)
  layers    all saved activations, one layer's backward, gradients in transit, gathered parameters
  tables    the gradients of embeddings and head, which are whole for a moment
  optimizer the gradients of one sub-group in the optimizer's precision

With activation checkpointing the saved activations are the input of each layer, and one whole
layer. With adapters (lora.rank) only trainable parameters have gradients and optimizer states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lbr_ds.config.ds_config import Layout
from lbr_ds.objectives.head_chunk import head_block, head_chunk
from lbr_ds.plan.shape import Shape
from lbr_ds.plan.work import Work

# The loss of stage 2 holds so many scores at a time, or those of so many queries.
_TILE, _TILE_ROWS = 1 << 20, 32  # TILE and MIN_ROWS of objectives/info_nce.py, which needs torch


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        states: on the GPU from step to step, by part.
        phases: on the GPU in addition, in each phase of a step.
        host: on the host, by offloading.
    """

    states: dict[str, int]
    phases: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        """The largest size of the GPU's tensors at any time."""
        return sum(self.states.values()) + max(self.phases.values())


def memory_of(
    shape: Shape, layout: Layout, work: Work, *, world: int, checkpointing: bool, gpu: bool = True
) -> Memory:
    """Return the memory of one rank.

    Args:
        shape: the backbone.
        layout: the ds_config.
        work: the rank's share of a step.
        world: number of ranks.
        checkpointing: whether activations are checkpointed.
        gpu: False for CPU ranks, where the optimizer needs temporaries of two numbers per
            parameter, attention computes in fp32, and Gloo and mixed sums make copies.
    """
    states, host = _states(shape, layout, world)
    saved, layer = activations(shape, work, layout.width, checkpointing, layout.width if gpu else 4)
    # A single rank holds all parameters, and DeepSpeed gathers nothing.
    gathered = gathered_parameters(shape, layout, checkpointing) * layout.width if world > 1 else 0
    transit = _transit(shape, layout, world, gpu)
    head_now, head_kept = head(shape, work, layout.width, gpu)
    contrast = vectors(shape, work, world)
    phases = {
        "head": gathered + saved + head_now,
        "layers": gathered + saved + layer + head_kept + contrast + transit,
        "tables": gathered + head_kept + contrast + _table_gradient(shape, layout, gpu, transit),
        "optimizer": _update(shape, layout, world, gpu),
    }
    return Memory(states, phases, host)


def _states(shape: Shape, layout: Layout, world: int) -> tuple[dict[str, int], int]:
    """Return the states (on the GPU by part, on the host)."""
    shard, trainable = shape.shard(world), shape.trainable_shard(world)
    if layout.stage < 3:
        held = shape.trainable if layout.stage == 1 else 2 * trainable
        buckets = 2 if layout.overlap else 1
        gpu = {
            "parameters": shape.total * layout.width,
            "gradients": held * layout.gradient_width,
            "reduction bucket": buckets * layout.reduce_bucket * layout.width,
        }
    else:
        gpu = {
            "parameters": (shard + shape.persistent(layout.persistent)) * layout.width,
            "gradients": trainable * layout.gradient_width,
            "reduction bucket": layout.reduce_bucket * layout.width,
        }
        if layout.hpz > 1:
            second = shape.shard(layout.group(world), layout.persistent)
            gpu["second copy"] = second * layout.width
    # Weights that have the optimizer's own precision are copied all the same (seen on 0.19.8).
    gpu["optimizer"] = trainable * (layout.master_width + 2 * layout.moment_width)
    host = 0
    if layout.stage == 3 and layout.offload_parameters:
        gpu["parameters"] -= shard * layout.width
        host += shard * layout.width
    if layout.offload_optimizer:
        # Gradients are held where the optimizer is, and once more in its precision.
        gradients = gpu.pop("gradients") if layout.stage == 3 else 0
        host += gradients + gpu.pop("optimizer") + trainable * layout.master_width
    return gpu, host


def gathered_parameters(shape: Shape, layout: Layout, checkpointing: bool) -> int:
    """Return the gathered parameters at one time, without the persistent ones; 0 below stage 3.

    A gathered parameter is released after use unless it is used again within `layout.reuse`
    parameters, so the last layers are kept from forward to backward: each parameter of the backward
    counts once more, and with checkpointing twice more. The prefetched parameters and the module
    that computes are added.
    """
    if layout.stage < 3:
        return 0
    module = max(math.prod(t) for t in shape.tensors)
    persistent = shape.persistent(layout.persistent)
    kept = layout.reuse // (3 if checkpointing else 2)
    if layout.by_layer(shape.layer_parameters):
        module = max(module, shape.layer_parameters)
    return min(shape.total - persistent, kept + layout.prefetch + module)


def activations(
    shape: Shape, work: Work, width: int, checkpointing: bool, attention_width: int
) -> tuple[int, int]:
    """Return the activations of a full micro-batch.

    Returns:
        (bytes saved by the forward, bytes in addition during the backward of a layer).
    """
    layer = layer_activations(shape, work, width, attention_width)
    tokens, hidden = work.micro_tokens, shape.hidden
    # The backward of the MLP holds the gradients of its three inner tensors.
    backward = tokens * (3 * shape.inner * width + 2 * hidden * 4)
    last = tokens * hidden * (4 + width) + 4 * tokens  # the last norm
    rotary = 2 * tokens * shape.head_size * width  # tables of all layers
    if checkpointing:
        return shape.layers * tokens * hidden * width + last + rotary, layer + backward
    return shape.layers * layer + last + rotary, backward


def layer_activations(shape: Shape, work: Work, width: int, attention_width: int) -> int:
    """Return the bytes that one decoder layer saves for its backward, over a full micro-batch.

    A norm saves its input in fp32 and its output before and after the gain. Attention saves q, k, v
    and its output (the bottleneck's rows twice) in `attention_width`, the log-sums in fp32, and the
    input of its output projection; the MLP saves its four inner tensors.
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
    # The tensor between the two matrices of each adapter of a layer.
    attention += tokens * width * sum(rank for rank, _ in shape.adapters[::2]) // shape.layers
    return 2 * norm + attention + 4 * tokens * shape.inner * width


def head(shape: Shape, work: Work, width: int, gpu: bool = True) -> tuple[int, int]:
    """Return the bytes of the head and its loss for a full micro-batch of stage 1.

    The head's gradient is computed in the forward, a chunk of rows at a time, and scaled in the
    backward (objectives/linear_cross_entropy.py). It is in fp32 where it is the sum of several.

    Returns:
        (bytes in the head's forward or backward, bytes kept after that).
    """
    rows = work.packed * work.supervised
    if not rows:
        return 0, 0
    states = rows * shape.hidden * width  # the rows that are read; their gradient is as large
    weight = 0 if shape.adapters else shape.head  # a frozen head has no gradient
    kept = 2 * states + weight * width
    chunk = -(-rows // head_chunks(shape, work, width, gpu))
    logits = chunk * shape.vocab * width
    if width == 4:
        return logits + kept, kept
    logits += min(chunk, head_block(shape.vocab, gpu)) * shape.vocab * 4
    if chunk == rows:
        return logits + kept, kept
    # A CPU converts the bf16 gradient of a chunk to fp32 before it adds it to the sum.
    added = 0 if gpu else width + 4
    forward = logits + weight * (4 + added)
    return 2 * states + max(forward, weight * (4 + width)), kept


def head_chunks(shape: Shape, work: Work, width: int, gpu: bool = True) -> int:
    """Return the number of chunks in which the head computes a full micro-batch's logits."""
    rows = work.packed * work.supervised
    return -(-rows // head_chunk(rows, shape.hidden, shape.vocab, width, gpu=gpu))


def vectors(shape: Shape, work: Work, world: int) -> int:
    """Return the bytes of stage 2's fp32 vectors for a whole step, their gradients, and the scores.

    The rank's own vectors are held three times (in pieces, joined, gradient), the gathered
    candidates twice, and for each pair of a tile (objectives/info_nce.py) five fp32 numbers and
    two booleans.
    """
    if not work.queries:
        return 0
    own = work.queries + work.candidates
    everyone = work.candidates * world
    held = 3 * own + 2 * everyone if work.cached else own + 2 * everyone
    pairs = min(work.queries * everyone, max(_TILE, _TILE_ROWS * everyone))
    return held * shape.hidden * 4 + pairs * 22


def _table_gradient(shape: Shape, layout: Layout, gpu: bool, transit: int) -> int:
    """Return the bytes of a table's gradient and of the gradients in transit beside it.

    A gradient larger than the bucket is reduced in place, after the bucket's contents.
    """
    if shape.adapters:
        return transit
    size = shape.head * layout.width
    if layout.stage == 3 and shape.head > layout.reduce_bucket:
        return size if gpu else 2 * size
    return size + transit


def _transit(shape: Shape, layout: Layout, world: int, gpu: bool) -> int:
    """Return the bytes of gradients in transit: the bucket's copy by rank, and its reduced part.

    Gloo's reduce-scatter makes one more copy of its input.
    """
    bucket = min(layout.reduce_bucket, shape.trainable)
    if layout.stage < 3:
        return bucket * layout.width
    # A layer that is gathered as a whole keeps its gradients until its end.
    waiting = shape.layer_parameters if layout.by_layer(shape.layer_parameters) else 0
    copies = 1 if gpu else 2
    return (copies * bucket + bucket // world + waiting) * layout.width


def _update(shape: Shape, layout: Layout, world: int, gpu: bool) -> int:
    """Return the optimizer's temporaries: one sub-group's gradients in its precision, and more."""
    if layout.offload_optimizer:
        return 0
    # Weights with and without weight decay are in separate groups.
    largest = max(shape.decayed, shape.trainable - shape.decayed) // world
    group = min(largest, layout.sub_group) if layout.stage == 3 else largest
    size = group * layout.master_width
    if layout.gradient_width != layout.master_width:
        size += group * layout.gradient_width
    return size if gpu else size + 2 * group * layout.master_width
