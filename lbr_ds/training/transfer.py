"""Copy micro-batches to the GPU while it computes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch

from lbr_ds.batching import PackedBatch
from lbr_ds.batching.pack import with_tensors


def ahead(batches: Iterable[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """Yield each batch on the device, when the copy of the next one has been started.

    On a GPU the copies have a stream of their own. From pinned memory (`Work.pin_memory`) neither
    the host nor the computation waits for them.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = _stream(device)
    coming: PackedBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            following = batch.to(device)
        if coming is not None:
            yield coming
        coming = _arrived(following, copies)
    if coming is not None:
        yield coming


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies, always the same: the allocator keeps memory for each stream."""
    return torch.cuda.Stream(device)


def _arrived(batch: PackedBatch, copies: torch.cuda.Stream) -> PackedBatch:
    """Make the current stream wait for a batch's copy, and keep its memory while it is used."""
    current = torch.cuda.current_stream()
    current.wait_stream(copies)

    def used(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(current)
        return tensor

    return with_tensors(batch, used)
