"""Compute which record is sample (lane, step) where sources are drawn by weight. Pure arithmetic.

Each shard has records of one source. Two parts decide:

1. Turns. A turn is one sample (turn = step * lanes + lane), or under `homogeneous` one step. In
   each block of 65,536 turns source s has a fixed number c_s, proportional to its share. The i-th
   turn of source s in a block gets the key (i + u) / c_s, with u in [0, 1) drawn by (seed, block,
   s), and the turns of all S sources are sorted by key. So after t turns of a block the turns of s
   differ from t * c_s / 65,536 by at most 1 + S * c_s / 65,536: no source is early or late.
2. Records. Each source has an `Order` of its own. Before turn t of block b source s had
   b * c_s + (its turns in the block before t) turns, say j; the turn gets sample j of its order, in
   lane j % m at step j // m for m lanes. Under `homogeneous` it gets step j of all lanes.

So every record of a source is drawn once per epoch of that source, any step is computed directly,
and the samples of a step do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lbr_ds.config.mixing import Mixing
from lbr_ds.shards.manifest import ShardFile
from lbr_ds.shards.order import Order, Place
from lbr_ds.shards.sources import shard_sources

TURNS = 1 << 16  # of a block; the smallest share is one of them
_KEPT_BLOCKS = 2  # the lanes of a step may be in two blocks


class _Block(NamedTuple):
    """The turns of one block: whose each is, and how many that source had before in the block."""

    owner: NDArray[np.intp]
    before: NDArray[np.intp]


def turns_of(shares: Sequence[float]) -> NDArray[np.int64]:
    """Return how many turns of a block each source has, by largest remainders; at least one."""
    quotas = np.asarray(shares, np.float64) * TURNS
    turns = np.maximum(np.floor(quotas), 1).astype(np.int64)
    while (left := TURNS - int(turns.sum())) != 0:
        gaps = quotas - turns
        if left < 0:
            gaps = np.where(turns > 1, -gaps, -np.inf)
        turns[np.argsort(-gaps, kind="stable")[: abs(left)]] += 1 if left > 0 else -1
    return turns


def mixture_of(shards: Sequence[ShardFile], rule: Mixing, *, seed: int, lanes: int) -> Mixture:
    """Return the order of a split's shards, which are of one source each, by the recipe's rule."""
    return Mixture(
        [shard.records for shard in shards],
        [shard.source for shard in shards],
        rule.shares(shard_sources(shards)),
        seed=seed,
        lanes=lanes,
        homogeneous=rule.homogeneous,
    )


class Mixture:
    """The order of one split whose sources are drawn by weight; it serves as `Order` does."""

    def __init__(
        self,
        counts: Sequence[int],
        sources: Sequence[str],
        shares: Mapping[str, float],
        *,
        seed: int,
        lanes: int,
        homogeneous: bool = False,
    ) -> None:
        """Set up the order.

        Args:
            counts: Records of each shard.
            sources: The source of each shard.
            shares: The share of the samples of each source.
            seed: Decides the order.
            lanes: Samples of a step.
            homogeneous: Whether all samples of a step are of one source; each source then has at
                least `lanes` records.
        """
        self.names = sorted(set(sources))
        assert len(self.names) <= TURNS
        self.seed, self.lanes, self.homogeneous = seed, lanes, homogeneous
        self.turns = turns_of([shares[name] for name in self.names])
        self._shards = [
            [n for n, source in enumerate(sources) if source == name] for name in self.names
        ]
        self.orders = [
            self._order(name, [counts[n] for n in shards], share)
            for name, shards, share in zip(
                self.names, self._shards, self.turns / TURNS, strict=True
            )
        ]
        self._blocks: dict[int, _Block] = {}

    def _order(self, name: str, counts: list[int], share: float) -> Order:
        """Return the order of one source, with about as many lanes as it has samples of a step."""
        lanes = self.lanes
        if not self.homogeneous:
            lanes = min(max(round(share * lanes), 1), sum(counts))
        return Order(counts, seed=self._seed(name), lanes=lanes)

    def _seed(self, name: str) -> int:
        """Return a seed for one source, which does not depend on the other sources."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def place(self, lane: int, step: int, attempt: int = 0) -> Place:
        """Return the place of the sample of `lane` at `step`; attempt: as for `Order.place`.

        A replacement is of the same source.
        """
        source, count = self._turn(lane, step)
        order = self.orders[source]
        if self.homogeneous:
            own = order.place(lane, count, attempt)
        else:
            own = order.place(count % order.lanes, count // order.lanes, attempt)
        return own._replace(shard=self._shards[source][own.shard])

    def replacements(self, lane: int, step: int) -> int:
        """Return how many records may take the place of this sample; see `Order.replacements`."""
        source, _ = self._turn(lane, step)
        return self.orders[source].replacements(lane, step)

    def drawn(self, steps: int) -> dict[str, int]:
        """Return how many samples of each source the first `steps` steps have."""
        number, inside = divmod(steps if self.homogeneous else steps * self.lanes, TURNS)
        within = np.bincount(self._block(number).owner[:inside], minlength=len(self.names))
        each = self.lanes if self.homogeneous else 1
        totals = (number * self.turns + within) * each
        return dict(zip(self.names, totals.tolist(), strict=True))

    def _turn(self, lane: int, step: int) -> tuple[int, int]:
        """Return whose turn it is, and how many turns that source had before."""
        turn = step if self.homogeneous else step * self.lanes + lane
        number, inside = divmod(turn, TURNS)
        block = self._blocks.get(number) or self._block(number)
        source = int(block.owner[inside])
        return source, number * int(self.turns[source]) + int(block.before[inside])

    def _block(self, number: int) -> _Block:
        """Return a block of turns, and keep the latest ones."""
        keys = np.concatenate(
            [
                (np.arange(turns) + self._uniform(name, number, turns)) / turns
                for name, turns in zip(self.names, self.turns.tolist(), strict=True)
            ]
        )
        sources = np.repeat(np.arange(len(self.names)), self.turns)
        nth = np.concatenate([np.arange(turns) for turns in self.turns.tolist()])
        order = np.argsort(keys, kind="stable")
        if len(self._blocks) >= _KEPT_BLOCKS:
            self._blocks.pop(min(self._blocks))
        block = self._blocks[number] = _Block(sources[order], nth[order])
        return block

    def _uniform(self, name: str, block: int, count: int) -> NDArray[np.float64]:
        """Return numbers in [0, 1), the same on every machine: see `order.permutation`."""
        seed = self._seed(f"turns/{name}")
        words = [seed & 0xFFFFFFFF, seed >> 32, block]
        raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)
        return (np.asarray(raw, np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
