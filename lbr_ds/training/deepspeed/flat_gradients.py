"""ZeRO-1 and 2 reduce gradients by buckets instead of one by one; the results are the same.

DeepSpeed 0.19 handles each gradient by itself: a hook, a copy into a bucket, a copy out of it, a
norm and two checks that it is finite, from Python. That takes half as long again as the forward and
backward of a layer whose kernels are small. Here the gradients of a bucket (`reduce_bucket_size`
consecutive parameters) are joined by one kernel, averaged over the ranks by one all-reduce, and
this rank's part is added to its partition. A hook only counts which buckets are complete, so that
an all-reduce runs during the backward.

Under ZeRO-1 gradients add up on the parameters until the last micro-batch, under ZeRO-2 each
micro-batch is reduced, as in DeepSpeed. `Engine` decides by `fits` whether DeepSpeed's own way
stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbr_ds.distributed import World


@dataclass
class _Bucket:
    """Consecutive parameters of a group.

    Attributes:
        group: the number of the parameter group.
        start: of the first parameter in the group's flat tensor.
        params: the parameters.
        missing: how many of them have no gradient of this backward yet.
    """

    group: int
    start: int
    params: list[nn.Parameter]
    missing: int = 0


class _Partition(list[Tensor]):
    """A rank's part of a group's gradient; DeepSpeed takes `flat_partition` as it is.

    DeepSpeed asks for the gradient of one parameter by its place among those of this rank.
    """

    def __init__(self, flat: Tensor, params: list[Any]) -> None:
        super().__init__([flat])
        self.flat_partition, self._params = flat, params

    def __getitem__(self, index: Any) -> Any:
        place = self._params[index]._hp_mapping.hp_fragment_address
        return self.flat_partition.narrow(0, place.start, place.numel)


def fits(optimizer: Any) -> bool:
    """Return whether gradients are reduced as DeepSpeed would: in one precision, on the device."""
    plain = optimizer.gradient_accumulation_dtype == optimizer.communication_data_type
    plain &= optimizer.dtype == optimizer.communication_data_type
    extras = (optimizer.cpu_offload, optimizer.has_moe_layers, optimizer.round_robin_gradients)
    padded = any(any(padding) for padding in optimizer.round_robin_bit16_padding)
    return plain and optimizer.gradient_average and not (any(extras) or padded)


class FlatGradients:
    """Takes the place of a DeepSpeed optimizer's own reduction."""

    def __init__(self, optimizer: Any, world: World) -> None:
        """Replace the optimizer's hooks and its methods that reduce gradients."""
        self.optimizer, self.world = optimizer, world
        self._parts: dict[int, Tensor] = {}  # of the gradient, by group; here until the last
        self._buckets = list(_buckets(optimizer))[::-1]  # in the order of a backward
        self._next = 0  # bucket to reduce
        self._pending: tuple[_Bucket, Tensor, Any] | None = None
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks.clear()
        for bucket in self._buckets:
            for parameter in bucket.params:
                parameter.register_post_accumulate_grad_hook(self._counter(bucket))
        self._restart()
        optimizer.reduce_gradients = self.finish
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.finish
        optimizer.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
        optimizer.setup_buckets = lambda: None
        # The parameters are views of the flat tensors that an update writes to.
        optimizer._update_model_bit16_weights = lambda group: None

    def norm_squared(self) -> Tensor:
        """Return the squared norm of this rank's part of the gradient, after the last backward."""
        parts = [part.flat_partition for part in self.optimizer.averaged_gradients.values()]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
        return torch.stack(norms).double().square().sum()

    def _counter(self, bucket: _Bucket) -> Any:
        optimizer = self.optimizer

        def count(parameter: Tensor) -> None:
            if optimizer._coalesce_grad_reduction:
                return
            if optimizer.partition_gradients or optimizer._is_gradient_accumulation_boundary:
                bucket.missing -= 1
                if not bucket.missing:
                    self._reduce_complete()

        return count

    def _reduce_complete(self) -> None:
        """Reduce the buckets that are complete, on all ranks in one order."""
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._start(self._buckets[self._next])
            self._next += 1

    def finish(self, pipeline_parallel: bool = False) -> None:
        """Reduce what is left after a backward; after the last one, hand it to the optimizer."""
        for bucket in self._buckets[self._next :]:
            self._start(bucket)
        self._complete()
        self._restart()
        optimizer = self.optimizer
        if optimizer.is_gradient_accumulation_boundary():
            for group, part in self._parts.items():
                params = optimizer.params_in_partition[group]
                optimizer.averaged_gradients[group] = _Partition(part, params)
            self._parts = {}

    def _restart(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.params)

    @torch.no_grad()
    def _start(self, bucket: _Bucket) -> None:
        """Join a bucket's gradients, and start to average them."""
        pieces = []
        for parameter in bucket.params:
            slope, parameter.grad = parameter.grad, None
            pieces.append(torch.zeros_like(parameter) if slope is None else slope)
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        del pieces
        self._complete()  # so that at most two buckets are in memory
        self._pending = (bucket, flat, self.world.start_average(flat))

    @torch.no_grad()
    def _complete(self) -> None:
        """Add this rank's part of the bucket whose average was started to its partition."""
        if self._pending is None:
            return
        (bucket, flat, average), self._pending = self._pending, None
        self.world.wait(average)
        size = int(self.optimizer.partition_size[bucket.group])
        own = self.world.rank * size - bucket.start  # where the partition begins in the bucket
        low, high = max(0, own), min(len(flat), own + size)
        part = self._parts.get(bucket.group)
        if part is None:
            part = self._parts[bucket.group] = flat.new_zeros(size)
        if low < high:
            part[low - own : high - own] += flat[low:high]


def _buckets(optimizer: Any) -> Any:
    """Yield the parameters of each group in buckets of at most `reduce_bucket_size` numbers."""
    for group, params in enumerate(optimizer.bit16_groups):
        start = count = 0
        chosen: list[nn.Parameter] = []
        for parameter in params:
            if chosen and count + parameter.numel() > optimizer.reduce_bucket_size:
                yield _Bucket(group, start, chosen)
                start, count, chosen = start + count, 0, []
            chosen.append(parameter)
            count += parameter.numel()
        yield _Bucket(group, start, chosen)
