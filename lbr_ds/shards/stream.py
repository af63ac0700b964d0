"""Shards -> the samples of each step, from any step on. The order is `order.py`'s.

The pipeline is `webdataset.DataPipeline([Source, Decode, Group])`: places -> raw bytes by pread,
bytes -> record, samples -> step. Lane l belongs to rank l % world, so the samples of a step are the
same whatever the number of ranks, and the only state of a run's data is the number of its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record
from lbr_ds.shards.manifest import Manifest
from lbr_ds.shards.order import Order
from lbr_ds.shards.reader import Tars, decode

if TYPE_CHECKING:
    from webdataset import DataPipeline


@dataclass(frozen=True)
class Sample:
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


class Raw(NamedTuple):
    """A sample before it is decoded."""

    step: int
    lane: int
    epoch: int
    shard: int
    record: int
    data: bytes


class Drawn(NamedTuple):
    """A decoded sample, and how many unreadable ones it took the place of."""

    step: int
    sample: Sample
    skipped: int


class Source:
    """Stage 1: the places of a rank's samples, in order, and the bytes found there."""

    def __init__(
        self, tars: Tars, order: Order, *, lanes: range, first: int, stop: int | None, stride: int
    ) -> None:
        self.tars = tars
        self.order = order
        self.lanes = lanes
        self.first, self.stop, self.stride = first, stop, stride

    def __call__(self) -> Iterator[Raw]:
        endless = count(self.first, self.stride)
        own = endless if self.stop is None else range(self.first, self.stop, self.stride)
        for step in own:
            for lane in self.lanes:
                yield self.read(step, lane)

    def read(self, step: int, lane: int, attempt: int = 0) -> Raw:
        """The bytes of the sample, or of the one `attempt` further on in its block."""
        epoch, shard, record = self.order.place(lane, step, attempt)
        return Raw(step, lane, epoch, shard, record, self.tars.read(shard, record))


class Decode:
    """Stage 2: bytes -> record.

    A record that cannot be read ends the run (strict), or the next readable one of the same block
    takes its place and it is counted (skip). The choice is again a pure function of the step, so
    ranks stay in step; the record that stands in is also seen at its own turn. A missing or
    truncated shard is an error under both.
    """

    def __init__(self, source: Source, on_error: Literal["strict", "skip"]) -> None:
        self.source = source
        self.on_error = on_error

    def __call__(self, raws: Iterator[Raw]) -> Iterator[Drawn]:
        for raw in raws:
            try:
                drawn = self._drawn(raw, 0)
            except DataError as error:
                if self.on_error == "strict":
                    raise DataError(
                        f"{error}; run `lbr-ds prepare` again, or set data.on_error=skip"
                    ) from None
                drawn = self._substitute(raw, error)
            yield drawn

    def _drawn(self, raw: Raw, skipped: int) -> Drawn:
        record = decode(raw.data, self.source.tars.where(raw.shard, raw.record))
        return Drawn(raw.step, Sample(raw.lane, raw.epoch, record), skipped)

    def _substitute(self, bad: Raw, error: DataError) -> Drawn:
        length = self.source.order.block_length(bad.lane, bad.step)
        for attempt in range(1, length):
            raw = self.source.read(bad.step, bad.lane, attempt)
            try:
                return self._drawn(raw, attempt)
            except DataError as another:
                error = another
        raise DataError(f"{error}; so are all {length} records of its block: prepare again")


class Group:
    """Stage 3: the samples of one step -> a Step."""

    def __init__(self, per_step: int) -> None:
        self.per_step = per_step

    def __call__(self, drawn: Iterator[Drawn]) -> Iterator[Step]:
        while part := list(islice(drawn, self.per_step)):
            skipped = sum(one.skipped for one in part)
            yield Step(part[0].step, [one.sample for one in part], skipped)


def steps(
    folder: Path,
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
) -> DataPipeline:
    """The pipeline whose iteration yields this rank's `Step`s start+worker, +workers, ... < stop.

    Each Step has samples_per_step / world samples. With `stop=None` it never ends. Readers that
    take the workers' steps in turn see every step from `start` on, in order.

    Raises ConfigError when `world` does not divide `samples_per_step`, DataError when the split is
    missing, damaged or smaller than `samples_per_step`.
    """
    assert start >= 0
    assert 0 <= rank < world
    assert 0 <= worker < workers
    _check_world(samples_per_step, world)
    manifest = Manifest.load(folder)
    manifest.check(split)
    total = manifest.records(split)
    if total < samples_per_step:
        raise DataError(
            f"{folder}: split {split!r} holds {total} records, fewer than "
            f"samples_per_step={samples_per_step}; lower samples_per_step or prepare more data"
        )
    # webdataset imports torch; what only reads a manifest should not pay for that.
    from webdataset import DataPipeline

    shards = manifest.shards(split)
    order = Order([shard.records for shard in shards], seed=seed, lanes=samples_per_step)
    lanes = range(rank, samples_per_step, world)
    source = Source(
        Tars(folder, shards), order, lanes=lanes, first=start + worker, stop=stop, stride=workers
    )
    return DataPipeline(source, Decode(source, on_error), Group(len(lanes)))


def _check_world(samples_per_step: int, world: int) -> None:
    if samples_per_step % world:
        below = samples_per_step // world * world
        either = f"{below} or {below + world}" if below else str(world)
        raise ConfigError(
            f"samples_per_step={samples_per_step} is not a multiple of world={world} ranks; "
            f"use {either}"
        )
