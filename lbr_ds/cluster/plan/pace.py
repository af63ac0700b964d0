"""Bytes that a rank receives in a step, and how long the step takes. Assumptions are in ASSUMED.

A gather of S bytes over N ranks in n nodes of g: a rank gets S (N-1)/N over its links; a node gets
S (n-1)/n once from outside, through its g network ports together. A reduce-scatter costs the same
the other way, an all-reduce both. ZeRO-3 gathers the layers for each forward and each backward and
reduces the gradients of each micro-batch (DeepSpeed accumulates shards, not whole gradients).
ZeRO++'s second copy is made by a step's first forward and dropped by its update, so all further
gathers stay among the ranks that share it (stage3.py, _post_step). ZeRO-2 reduces each micro-batch,
and ZeRO-1 once a step, by all-reduce; both gather the new parameters once a step. What `reuse`
keeps from forward to backward is not taken off.
"""

from __future__ import annotations

from dataclasses import dataclass

from lbr_ds.cluster.plan.gpus import Cluster
from lbr_ds.cluster.plan.memory import layer_activations
from lbr_ds.cluster.plan.shape import Shape
from lbr_ds.cluster.plan.work import Work
from lbr_ds.config.ds_config import Layout

ASSUMED = {
    "bandwidth": 0.75,  # of links and network that collectives reach
    "hbm": 0.8,  # of memory bandwidth that element-wise kernels reach
    "moves": 6,  # times that a saved activation's bytes go through memory in forward and backward
    "hidden_cost": 0.15,  # of the traffic behind computation that slows it down all the same
    "host_adam": 30e9,  # bytes/s a rank of the optimizer on the host
}
_ADAM_BYTES = (
    28  # read and written a number by mixed-precision Adam: 2 + 4 + 3 x 4, most of it twice
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives or sends in a step, by the way they take."""

    links: float
    network: float
    host: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.links + self.network + self.host


@dataclass(frozen=True)
class Pace:
    """Seconds of a step and what they are made of. exposed: waiting for traffic."""

    seconds: float
    compute: float
    exposed: float
    optimizer: float


def traffic_of(shape: Shape, layout: Layout, work: Work, cluster: Cluster) -> Traffic:
    """The traffic of one rank in one step."""
    size, learnt = shape.total * layout.width, shape.learnt * layout.width
    group = layout.group(cluster.world)
    gathered = near = 0.0  # among all ranks, and among those that share a second copy
    if layout.stage == 3:
        # As 8 bits, forward and backward (partition_parameters.py, _all_gather_coalesced).
        once = size / layout.width if layout.quantized_weights else size
        gathered = (work.passes + work.micro_batches) * once
        if 1 < group <= cluster.per_node:
            gathered, near = once, gathered - once
        # Quantised gradients go as 4 bits, and only between nodes (stage3.py, __avg_scatter_grads).
        quarter = layout.quantized_gradients and cluster.nodes > 1
        reduced = work.micro_batches * learnt * (0.5 / layout.width if quarter else 1)
    elif layout.stage == 2:
        gathered, reduced = learnt, 2.0 * work.micro_batches * learnt
    else:
        gathered, reduced = learnt, 2.0 * learnt
    vectors = 2.0 * work.candidates * cluster.world * shape.hidden * 4
    everywhere = gathered + reduced + vectors
    links = everywhere * (1 - 1 / cluster.world) + near * (1 - 1 / group)
    network = everywhere * (1 - 1 / cluster.nodes) / cluster.per_node
    host = _offloaded(shape, layout, work, cluster.world)
    return Traffic(links, network, host)


def _offloaded(shape: Shape, layout: Layout, work: Work, world: int) -> float:
    """Bytes between a GPU and its host."""
    share, learning = shape.sharded(world), shape.learning_share(world)
    host = 0.0
    if layout.offload_parameters:
        host += (work.passes + work.micro_batches) * share * layout.width
    if layout.offload_optimizer:
        # Each further micro-batch fetches what was added up, adds, and puts it back.
        host += (2 * work.micro_batches - 1) * learning * layout.gradient_width
        host += learning * layout.width
    return host


def pace_of(
    shape: Shape, layout: Layout, work: Work, cluster: Cluster, checkpointing: bool
) -> Pace:
    """The step's time: computation or traffic, whichever is longer, then the optimizer."""
    gpu = cluster.gpu
    compute = _compute(shape, work, cluster, checkpointing, layout.width)
    traffic = traffic_of(shape, layout, work, cluster)
    share = ASSUMED["bandwidth"]
    wire = max(
        traffic.links / (gpu.link * 1e9 * share), traffic.network / (gpu.network * 1e9 * share)
    )
    wire = max(wire, traffic.host / (gpu.host_link * 1e9 * share))
    exposed = wire if not layout.overlap else max(0.0, wire - compute)
    exposed += ASSUMED["hidden_cost"] * (wire - exposed)
    numbers = shape.learning_share(cluster.world)
    rate = ASSUMED["host_adam"] if layout.offload_optimizer else gpu.hbm * 1e9 * ASSUMED["hbm"]
    optimizer = numbers * _ADAM_BYTES / rate
    return Pace(compute + exposed + optimizer, compute, exposed, optimizer)


def _compute(shape: Shape, work: Work, cluster: Cluster, checkpointing: bool, width: int) -> float:
    """Seconds of arithmetic and of element-wise memory traffic, recomputation included."""
    gpu = cluster.gpu
    # Checkpointing and caching add a forward of the layers each.
    again = int(checkpointing) + int(work.cached)
    arithmetic = work.useful(shape) + again * work.again(shape)
    saved = shape.layers * layer_activations(shape, work, width, width) / work.micro_tokens
    moved = saved * work.tokens * ASSUMED["moves"] * (1 + again / 3)
    peak = gpu.tflops * 1e12 * gpu.matmul
    return arithmetic / peak + moved / (gpu.hbm * 1e9 * ASSUMED["hbm"])
