"""Compute which record is sample (lane, step) for a seed. Pure arithmetic: no file, no state.

1. The shards are permuted by (seed, epoch) and concatenated: N positions.
2. The run has L lanes, L = samples_per_step, and lane l owns positions [l*N//L, (l+1)*N//L).
3. A lane walks its chunk in blocks of 4096 positions, each permuted by (seed, epoch, lane, block).
4. At the end of its chunk it continues with its chunk of the next epoch.

So every record is seen once per epoch, any step is computed directly, and the order depends neither
on the number of ranks nor on that of workers. A chunk has N//L positions or one more: lanes end an
epoch at slightly different steps, and each counts its own epochs.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 4096
SHARDS, BLOCK, WRITE = 0, 1, 2  # purposes of a permutation, each with its own random stream


def permutation(length: int, seed: int, purpose: int, *numbers: int) -> NDArray[np.int64]:
    """Return a permutation of range(length), the same on every machine and numpy version.

    It sorts raw PCG64 output: numpy guarantees stable bit generators and SeedSequence, but not a
    stable Generator.permutation (NEP 19).
    """
    seed %= 1 << 64
    words = [seed & 0xFFFFFFFF, seed >> 32, purpose, *numbers]
    raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(length)
    return np.argsort(raw, kind="stable")


class Place(NamedTuple):
    """The place of a sample: number of the shard in file order, number of the record in it."""

    epoch: int
    shard: int
    record: int


@dataclass(frozen=True)
class _Block:
    """The samples of one lane for the steps `begin` to `end` of its block."""

    begin: int
    end: int
    order: array[int]  # reading an int from an array takes half the time of numpy
    first: int  # the block's first position
    epoch: int
    shards: list[int]
    starts: list[int]


class Order:
    """The order of one split for one seed and number of lanes, one block per lane in memory."""

    def __init__(self, counts: Sequence[int], *, seed: int, lanes: int) -> None:
        """Set up the order; `counts`: records of each shard, at least `lanes` in total."""
        self.counts = list(counts)
        self.seed = seed
        self.lanes = lanes
        self.total = sum(self.counts)
        assert self.total >= lanes
        self._blocks: dict[int, _Block] = {}
        self._shards: dict[int, tuple[list[int], list[int]]] = {}

    def place(self, lane: int, step: int, attempt: int = 0) -> Place:
        """Return the place of the sample of `lane` at `step`.

        attempt: n < total for the replacement of n unreadable samples: the n-th after it in its
        block, cyclically, and then what follows the block.
        """
        block = self._blocks.get(lane)
        if block is None or not block.begin <= step < block.end:
            block = self._blocks[lane] = self._enter(lane, step)
        order, starts = block.order, block.starts
        length = len(order)
        if attempt < length:
            position = block.first + order[(step - block.begin + attempt) % length]
        else:
            position = (block.first + attempt) % self.total
        nth = bisect_right(starts, position) - 1
        return Place(block.epoch, block.shards[nth], position - starts[nth])

    def replacements(self, lane: int, step: int) -> int:
        """Return how many records may take the place of this sample: all others."""
        return self.total - 1

    def _enter(self, lane: int, step: int) -> _Block:
        """Return the block of `lane` at `step`."""
        first = lane * self.total // self.lanes
        length = (lane + 1) * self.total // self.lanes - first
        epoch, inside = divmod(step, length)
        number = inside // WINDOW
        begin = epoch * length + number * WINDOW
        order = self._block(lane, epoch, number, min(WINDOW, length - number * WINDOW))
        return _Block(
            begin,
            begin + len(order),
            array("H", order.tobytes()),
            first + number * WINDOW,
            epoch,
            *self._epoch(epoch),
        )

    def _block(self, lane: int, epoch: int, block: int, length: int) -> NDArray[np.uint16]:
        return permutation(length, self.seed, BLOCK, epoch, lane, block).astype(np.uint16)

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return the shards in the order of an epoch, and the first position of each."""
        kept = self._shards.get(epoch)
        if kept is None:
            shards = permutation(len(self.counts), self.seed, SHARDS, epoch).tolist()
            starts = list(accumulate((self.counts[s] for s in shards), initial=0))[:-1]
            if len(self._shards) >= 4:  # lanes are in few different epochs
                self._shards.pop(min(self._shards))
            kept = self._shards[epoch] = (shards, starts)
        return kept
