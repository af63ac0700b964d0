"""Shards -> the samples of each step, from any step on. The order is `order.py`'s.

The pipeline is `webdataset.DataPipeline([Draw, Read, Decode])`, a step at a time: places -> bytes
by pread -> records. Lane l belongs to rank l % world, so a step's samples are the same whatever
the number of ranks, and the only state of a run's data is the number of its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lbr_ds.address import CACHE_GIB
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record
from lbr_ds.shards.manifest import Manifest
from lbr_ds.shards.order import Order, Place
from lbr_ds.shards.reader import Tars, decode, decode_sound

if TYPE_CHECKING:
    from webdataset import DataPipeline


class Sample(NamedTuple):
    """One record, the lane that drew it and that lane's epoch."""

    lane: int
    epoch: int
    record: Record


@dataclass(frozen=True)
class Step:
    """A rank's samples of one optimizer step, by rising lane; `skipped` unreadable ones aside."""

    index: int
    samples: list[Sample]
    skipped: int


class Places(NamedTuple):
    """Where the samples of one step lie, by rising lane."""

    step: int
    places: list[Place]


class Raw(NamedTuple):
    """The samples of one step before they are decoded."""

    step: int
    places: list[Place]
    data: list[bytes]


class Draw:
    """Stage 1: the places of a rank's samples, a step at a time, in order."""

    def __init__(
        self, order: Order, *, lanes: range, first: int, stop: int | None, stride: int
    ) -> None:
        self.order = order
        self.lanes = lanes
        self.first, self.stop, self.stride = first, stop, stride

    def __call__(self) -> Iterator[Places]:
        endless = count(self.first, self.stride)
        own = endless if self.stop is None else range(self.first, self.stop, self.stride)
        place, lanes = self.order.place, self.lanes
        for step in own:
            yield Places(step, [place(lane, step) for lane in lanes])


class Read:
    """Stage 2: the bytes found there."""

    def __init__(self, tars: Tars) -> None:
        self.tars = tars

    def __call__(self, drawn: Iterator[Places]) -> Iterator[Raw]:
        read = self.tars.read
        for step, places in drawn:
            yield Raw(step, places, [read(shard, record) for _, shard, record in places])


class Decode:
    """Stage 3: bytes -> records -> a Step.

    A record that cannot be read ends the run (strict), or the next readable one of the same block
    takes its place and it is counted (skip). The choice is again a pure function of the step, so
    ranks stay in step; the record that stands in is also seen at its own turn. A missing or
    truncated shard is an error under both.
    """

    def __init__(
        self, tars: Tars, order: Order, lanes: range, on_error: Literal["strict", "skip"]
    ) -> None:
        self.tars = tars
        self.order = order
        self.lanes = lanes
        self.on_error = on_error

    def __call__(self, raws: Iterator[Raw]) -> Iterator[Step]:
        for raw in raws:
            records, skipped = decode_sound(raw.data), 0
            if records is None:
                records, skipped = self._one_by_one(raw)
            drawn = zip(self.lanes, raw.places, records, strict=True)
            samples = [Sample(lane, place[0], record) for lane, place, record in drawn]
            yield Step(raw.step, samples, skipped)

    def _one_by_one(self, raw: Raw) -> tuple[list[Record], int]:
        """The records of a step with a fault in it, and how many were skipped."""
        records, skipped = [], 0
        for lane, place, data in zip(self.lanes, raw.places, raw.data, strict=True):
            try:
                records.append(decode(data, self.tars.where(place.shard, place.record)))
            except DataError as error:
                if self.on_error == "strict":
                    raise DataError(
                        f"{error}; run `lbr-ds prepare` again, or set data.on_error=skip"
                    ) from None
                record, attempts = self._substitute(lane, raw.step, error)
                records.append(record)
                skipped += attempts
        return records, skipped

    def _substitute(self, lane: int, step: int, error: DataError) -> tuple[Record, int]:
        length = self.order.block_length(lane, step)
        for attempt in range(1, length):
            _, shard, record = self.order.place(lane, step, attempt)
            data = self.tars.read(shard, record)
            try:
                return decode(data, self.tars.where(shard, record)), attempt
            except DataError as another:
                error = another
        raise DataError(f"{error}; so are all {length} records of its block: prepare again")


def steps(
    folder: Path | str,
    split: str,
    *,
    seed: int,
    samples_per_step: int,
    rank: int,
    world: int,
    start: int = 0,
    stop: int | None = None,
    worker: int = 0,
    workers: int = 1,
    on_error: Literal["strict", "skip"] = "strict",
    cache_gib: float = CACHE_GIB,
) -> DataPipeline:
    """The pipeline whose iteration yields this rank's `Step`s start+worker, +workers, ... < stop.

    folder: a prepared folder or its URL; cache_gib: room on this disk for a URL's shards.
    Each Step has samples_per_step / world samples. With `stop=None` it never ends. Readers that
    take the workers' steps in turn see every step from `start` on, in order.

    Raises ConfigError when `world` does not divide `samples_per_step`, DataError when the split is
    missing, damaged or smaller than `samples_per_step`.
    """
    assert start >= 0
    assert 0 <= rank < world
    assert 0 <= worker < workers
    _check_world(samples_per_step, world)
    manifest = Manifest.load(folder, cache_gib)
    manifest.check(split)
    total = manifest.records(split)
    if total < samples_per_step:
        raise DataError(
            f"{manifest.place}: split {split!r} holds {total} records, fewer than "
            f"samples_per_step={samples_per_step}; lower samples_per_step or prepare more data"
        )
    # webdataset imports torch; what only reads a manifest should not pay for that.
    from webdataset import DataPipeline

    shards = manifest.shards(split)
    order = Order([shard.records for shard in shards], seed=seed, lanes=samples_per_step)
    lanes = range(rank, samples_per_step, world)
    tars = Tars(manifest, split)
    return DataPipeline(
        Draw(order, lanes=lanes, first=start + worker, stop=stop, stride=workers),
        Read(tars),
        Decode(tars, order, lanes, on_error),
    )


def _check_world(samples_per_step: int, world: int) -> None:
    if samples_per_step % world:
        below = samples_per_step // world * world
        either = f"{below} or {below + world}" if below else str(world)
        raise ConfigError(
            f"samples_per_step={samples_per_step} is not a multiple of world={world} ranks; "
            f"use {either}"
        )
