"""Predict the bytes that a rank receives in a step and how long the step takes.

The assumptions are in ASSUMED, those about computation in pace.py. A gather of S bytes over N ranks
on n nodes of g GPUs: a rank gets S (N-1)/N over its links; a node gets S (n-1)/n once from the
other nodes, through its g network ports together. A reduce-scatter costs the same in the other
direction, an all-reduce both. ZeRO-3 gathers the layers for each forward and each backward and
reduces the gradients of each micro-batch (DeepSpeed accumulates shards, not whole gradients).
ZeRO++'s second copy is made by the first forward of a step and dropped by its update, so all
further gathers stay among the ranks that share it (stage3.py, _post_step). ZeRO-2 reduces each
micro-batch and ZeRO-1 once a step, by all-reduce; both gather the new parameters once a step.
Gathers that `Layout.reuse` saves are not subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

from lbr_ds.config.ds_config import Layout
from lbr_ds.plan import pace
from lbr_ds.plan.gpus import Cluster
from lbr_ds.plan.shape import Shape
from lbr_ds.plan.work import Work

ASSUMED = {
    "bandwidth": 0.75,  # share of links and network that collectives reach
    "hidden_cost": 0.15,  # share of the traffic behind computation that slows it down all the same
    "host_adam": 30e9,  # bytes/s per rank of the optimizer on the host
}
# Bytes that mixed-precision Adam reads and writes per parameter: 2 + 4 + 3 x 4, most of them twice.
_ADAM_BYTES = 28


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives or sends in a step: in its node, between nodes, to the host."""

    links: float
    network: float
    host: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.links + self.network + self.host


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and their parts.

    Attributes:
        compute: the device computes.
        host: the device waits for its host.
        exposed: it waits for traffic.
        optimizer: the update.
    """

    seconds: float
    compute: float
    host: float
    exposed: float
    optimizer: float


def traffic_of(shape: Shape, layout: Layout, work: Work, cluster: Cluster) -> Traffic:
    """Return the traffic of one rank in one step."""
    size, trainable = shape.total * layout.width, shape.trainable * layout.width
    group = layout.group(cluster.world)
    forwards, micro_batches = _passes(work)
    gathered = near = 0.0  # among all ranks, and among those that share a second copy
    if layout.stage == 3:
        # Quantized to 8 bits, forward and backward (partition_parameters.py).
        once = size / layout.width if layout.quantized_weights else size
        gathered = (forwards + micro_batches) * once
        if 1 < group <= cluster.per_node:
            gathered, near = once, gathered - once
        # Quantized to 4 bits, and only between nodes (stage3.py, __avg_scatter_grads).
        quarter = layout.quantized_gradients and cluster.nodes > 1
        reduced = micro_batches * trainable * (0.5 / layout.width if quarter else 1)
    elif layout.stage == 2:
        gathered, reduced = trainable, 2.0 * micro_batches * trainable
    else:
        gathered, reduced = trainable, 2.0 * trainable
    vectors = 2.0 * work.candidates * cluster.world * shape.hidden * 4
    everywhere = gathered + reduced + vectors
    links = everywhere * (1 - 1 / cluster.world) + near * (1 - 1 / group)
    network = everywhere * (1 - 1 / cluster.nodes) / cluster.per_node
    return Traffic(links, network, _to_host(shape, layout, work, cluster.world))


def _passes(work: Work) -> tuple[int, int]:
    """Return the forwards and the backwards (micro-batches) of a step."""
    return sum(p.forwards for p in work.parts), sum(p.micro_batches for p in work.parts)


def _to_host(shape: Shape, layout: Layout, work: Work, world: int) -> float:
    """Return the bytes between a GPU and its host."""
    trainable, size = shape.trainable_shard(world), 0.0
    forwards, micro_batches = _passes(work)
    if layout.offload_parameters:
        size += (forwards + micro_batches) * shape.shard(world) * layout.width
    if layout.offload_optimizer:
        # Each further micro-batch fetches the accumulated gradients, adds, and stores them again.
        size += (2 * micro_batches - 1) * trainable * layout.gradient_width
        size += trainable * layout.width
    return size


def step_time(
    shape: Shape, layout: Layout, work: Work, cluster: Cluster, checkpointing: bool
) -> StepTime:
    """Return the time of a step: the longest of computation, host and traffic; then the update."""
    gpu = cluster.gpu
    compute = busy = 0.0
    for part in work.parts:
        device = pace.device_seconds(
            shape, part, gpu, width=layout.width, checkpointing=checkpointing
        )
        compute += device.total
        busy += pace.busy_seconds(shape, part, device, layout.stage, checkpointing=checkpointing)
    traffic = traffic_of(shape, layout, work, cluster)
    reached = 1e9 * ASSUMED["bandwidth"]
    wire = max(
        traffic.links / (gpu.link * reached),
        traffic.network / (gpu.network * reached),
        traffic.host / (gpu.host_link * reached),
    )
    exposed = wire if not layout.overlap else max(0.0, wire - busy)
    exposed += ASSUMED["hidden_cost"] * (wire - exposed)
    on_gpu = gpu.hbm * 1e9 * pace.ASSUMED["hbm"]
    rate = ASSUMED["host_adam"] if layout.offload_optimizer else on_gpu
    optimizer = max(
        shape.trainable_shard(cluster.world) * _ADAM_BYTES / rate,
        shape.layers * pace.HOST[layout.stage].update,
    )
    return StepTime(
        seconds=busy + exposed + optimizer,
        compute=compute,
        host=busy - compute,
        exposed=exposed,
        optimizer=optimizer,
    )
