"""Predict how long a GPU computes in a step, and how long its host takes to launch the work.

Calibrated on one H100 (2026-11-28, torch 2.11, deepspeed 0.19.8, commit 8d587fb, decoder layers not
compiled), whose steps were limited by the host under every ZeRO stage at 0.5B and below. The
measured rows are in tests/plan/h100.yaml; a test holds the prediction to within 25 % of each.
ASSUMED and HOST are the only constants; new measurements replace them here.

A device's time is the sum of four kinds of work: matrix products at a share of the peak that grows
with the hidden size, attention at one that grows with the length of a segment, element-wise kernels
at the speed of memory, and the head, whose logits and whose gradient of the whole table go through
memory once a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from lbr_ds.plan.flops import causal_pairs, flops
from lbr_ds.plan.gpus import Gpu
from lbr_ds.plan.memory import head_chunks, layer_activations
from lbr_ds.plan.shape import Shape
from lbr_ds.plan.work import Work

ASSUMED = {
    # Share of memory bandwidth that element-wise kernels reach: data sheets, not fitted.
    "hbm": 0.8,
    # A product of hidden size w reaches gpu.matmul * w / (w + narrow). Fitted to the time of the
    # matrix products in the profile of a 0.5B step.
    "narrow": 128,
    # A segment of n tokens reaches attention * n / (n + segment) of the peak, forward and backward,
    # and a shorter one than a kernel's tile costs as much as a tile. Derived from two measured
    # kernels: 17.6 % at 2,050 tokens and 33 % at 8,190; texts of 50 tokens then come out right too.
    "attention": 0.47,
    "segment": 3400,
    "tile": 128,
    # Times that a saved activation goes through memory in forward and backward. Fitted to the eager
    # steps in plain torch; 8.7 with Liger's RMSNorm, RoPE and SwiGLU.
    "moves": 11.0,
    # Times that a logit goes through memory as a number of 4 bytes. Counted: product, conversion,
    # loss, and its gradient.
    "logit_moves": 6,
}


@dataclass(frozen=True)
class HostPace:
    """Seconds of the host for one decoder layer: the unit of modules that hooks are called for.

    Attributes:
        forward: of a forward pass.
        backward: of a backward pass.
        update: once a step.
        takes_turns: whether host and device take turns in a backward pass instead of overlapping.
    """

    forward: float
    backward: float
    update: float
    takes_turns: bool = False


# By ZeRO stage; 0 is plain torch. The proportions were measured on a CPU with a narrow model of 30
# layers; one factor for all, fitted to the H100's rows under zero3, makes them seconds of its host.
# takes_turns is fitted: under zero2 both rows are right within 15 % with it, and without it the one
# of 0.5B would be 45 % too fast. The cause has not been profiled. zero1 has not been measured on a
# GPU.
HOST = {
    0: HostPace(1.43e-3, 3.47e-3, 0.76e-3),
    1: HostPace(1.69e-3, 3.96e-3, 2.54e-3),
    2: HostPace(2.05e-3, 6.72e-3, 0.40e-3, takes_turns=True),
    3: HostPace(4.32e-3, 9.31e-3, 1.87e-3),
}


@dataclass(frozen=True)
class Busy:
    """Seconds of the device in one step, by pass. The head computes its gradient in the forward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Seconds of all passes."""
        return self.forward + self.backward


def device_seconds(
    shape: Shape,
    work: Work,
    gpu: Gpu,
    *,
    width: int,
    checkpointing: bool,
    moves: float = ASSUMED["moves"],
) -> Busy:
    """Return how long the device computes in a step, recomputation included.

    Args:
        shape: the backbone.
        work: the rank's share of a step.
        gpu: the device.
        width: bytes of an activation.
        checkpointing: whether activations are checkpointed.
        moves: see ASSUMED.
    """
    bandwidth = gpu.hbm * 1e9 * ASSUMED["hbm"]
    reached = gpu.tflops * 1e12 * gpu.matmul * shape.hidden / (shape.hidden + ASSUMED["narrow"])
    mean = max(1.0, 2 * work.pairs / work.length)  # exact for segments of one length
    segment = max(mean, ASSUMED["tile"])
    pairs = round(work.sequences * work.pairs * (segment / mean) ** 2)
    attending = gpu.tflops * 1e12 * ASSUMED["attention"] * segment / (segment + ASSUMED["segment"])
    saved = shape.layers * layer_activations(shape, work, width, width) / work.micro_tokens
    moved = saved * work.tokens * moves / bandwidth

    def layers(passes: int) -> float:
        """Seconds of the decoder layers: 1 forward, or 3, which is a forward and a backward."""
        products = flops(
            shape, tokens=work.tokens, pairs=0, passes=passes, adapters=shape.adapter_parameters
        )
        attention = flops(shape, tokens=0, pairs=pairs, passes=passes)
        return products / reached + attention / attending + moved * passes / 3

    once, both = layers(1), layers(3)
    return Busy(
        forward=once * (2 if work.cached else 1)
        + _head_seconds(shape, work, width, reached, bandwidth, cpu=gpu.cpu),
        backward=both - once + (once if checkpointing else 0.0),
    )


def encoding_seconds(shape: Shape, texts: int, length: int, gpu: Gpu, *, width: int) -> float:
    """Return how long a device takes to encode texts: a forward without gradient and head.

    Args:
        shape: the model.
        texts: number of texts.
        length: tokens of each, with its bottleneck.
        gpu: the device.
        width: bytes of an activation.
    """
    packed = max(1, encoded_together(cpu=gpu.cpu) // length)
    work = Work(
        stage=2,
        sequences=texts,
        length=length,
        supervised=0,
        copies=0,
        pairs=float(causal_pairs(length)),
        packed=packed,
        micro_batches=-(-texts // packed),
        cached=False,
        queries=0,
        candidates=0,
    )
    busy = device_seconds(shape, work, gpu, width=width, checkpointing=False)
    return max(busy.forward, shape.layers * work.micro_batches * HOST[0].forward)


def encoded_together(*, cpu: bool) -> int:
    """Return the tokens of one forward that keep a device busy; on a CPU more leave its cache."""
    return 2048 if cpu else 16384


def _head_seconds(
    shape: Shape, work: Work, width: int, reached: float, bandwidth: float, *, cpu: bool
) -> float:
    """Return the seconds of the head with its loss and gradient: products, logits, the table."""
    rows = work.sequences * work.supervised
    if not rows:
        return 0.0
    products = flops(shape, tokens=0, pairs=0, scored=rows)
    logits = rows * shape.vocab * 4 * ASSUMED["logit_moves"]
    # The gradient of the table is the sum of the chunks': each reads and writes it in fp32.
    chunks = head_chunks(shape, work, width, not cpu)
    sums = 0 if shape.adapters or chunks == 1 else work.micro_batches * chunks
    return products / reached + (logits + sums * shape.head * 8) / bandwidth


def busy_seconds(
    shape: Shape, work: Work, busy: Busy, zero_stage: int, *, checkpointing: bool
) -> float:
    """Return the seconds of a step's passes, in which device and host overlap or take turns."""
    host, layers = HOST[zero_stage], shape.layers * work.micro_batches
    forward = layers * host.forward
    backward = layers * (host.backward + (host.forward if checkpointing else 0.0))
    forward *= 2 if work.cached else 1
    if host.takes_turns:
        return max(forward, busy.forward) + backward + busy.backward
    return max(forward + backward, busy.total)
