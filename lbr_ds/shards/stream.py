"""Shards -> the samples of each step, from any step on. The order is `order.py`'s.

The pipeline is `webdataset.DataPipeline([Draw, Read, Decode])`, a step at a time: places -> bytes
by pread -> records. Lane l belongs to rank l % world, so a step's samples are the same whatever
the number of ranks, and the only state of a run's data is the number of its step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lbr_ds.errors import ConfigError, DataError
from lbr_ds.records import Record
from lbr_ds.shards.manifest import Manifest
from lbr_ds.shards.order import Order, Place
from lbr_ds.shards.reader import Tars, decode, decode_sound
from lbr_ds.system.urls import CACHE_GIB

if TYPE_CHECKING:
    from webdataset import DataPipeline

log = logging.getLogger(__name__)
_TOLD = 10  # unreadable records that a reading process logs


class Sample(NamedTuple):
    """One record, the lane that drew it, that lane's epoch, and the record's place."""

    lane: int
    epoch: int
    record: Record
    shard: int
    row: int


@dataclass(frozen=True)
class Step:
    """A rank's samples of one optimizer step, by rising lane; `skipped` of them are stand-ins."""

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
    """Stage 2: the bytes found there; with `skip` none for a record that cannot be read."""

    def __init__(self, tars: Tars, on_error: Literal["strict", "skip"]) -> None:
        self.tars = tars
        self.on_error = on_error

    def __call__(self, drawn: Iterator[Places]) -> Iterator[Raw]:
        for step, places in drawn:
            yield Raw(step, places, [self._read(shard, record) for _, shard, record in places])

    def _read(self, shard: int, record: int) -> bytes:
        try:
            return self.tars.read(shard, record)
        except DataError as error:
            if self.on_error == "strict":
                raise _with_cure(error) from None
            return b""  # `Decode` tries once more and counts it


class Decode:
    """Stage 3: bytes -> records -> a Step.

    A record that cannot be read (it, or its shard, is missing, cut, altered or no JSON) ends the
    run (strict), or it is counted and the next readable one takes its place (skip). The choice is
    again a pure function of the step, so ranks stay in step and no other sample changes; the
    record that stands in is also seen at its own turn.
    """

    def __init__(
        self, tars: Tars, order: Order, lanes: range, on_error: Literal["strict", "skip"]
    ) -> None:
        self.tars = tars
        self.order = order
        self.lanes = lanes
        self.on_error = on_error
        self.told = 0

    def __call__(self, raws: Iterator[Raw]) -> Iterator[Step]:
        for raw in raws:
            records, skipped, places = decode_sound(raw.data), 0, raw.places
            if records is None:
                records, places, skipped = self._one_by_one(raw)
            drawn = zip(self.lanes, raw.places, records, places, strict=True)
            samples = [
                Sample(lane, turn[0], record, place[1], place[2])
                for lane, turn, record, place in drawn
            ]
            yield Step(raw.step, samples, skipped)

    def _one_by_one(self, raw: Raw) -> tuple[list[Record], list[Place], int]:
        """The records of a step with a fault in it, where they lie, and how many stand in."""
        records, places, skipped = [], [], 0
        for lane, place in zip(self.lanes, raw.places, strict=True):
            try:
                record = self._record(place)
            except DataError as error:
                if self.on_error == "strict":
                    raise _with_cure(error) from None
                self._tell(error)
                record, place = self._substitute(lane, raw.step, error)
                skipped += 1
            records.append(record)
            places.append(place)
        return records, places, skipped

    def _record(self, place: Place) -> Record:
        data = self.tars.read(place.shard, place.record)
        return decode(data, self.tars.where(place.shard, place.record))

    def _substitute(self, lane: int, step: int, error: DataError) -> tuple[Record, Place]:
        for attempt in range(1, self.order.total):
            place = self.order.place(lane, step, attempt)
            try:
                return self._record(place), place
            except DataError:
                continue
        raise DataError(f"{error}; and no other record of the split can be read: prepare again")

    def _tell(self, error: DataError) -> None:
        """The first few in the log; all are counted."""
        self.told += 1
        if self.told <= _TOLD:
            more = "; further ones are only counted" if self.told == _TOLD else ""
            log.warning("skipped: %s%s", error, more)


def _with_cure(error: DataError) -> DataError:
    again = "" if "lbr-ds prepare" in str(error) else "run `lbr-ds prepare` again, or "
    return DataError(f"{error}; {again}set data.on_error=skip to go on without it")


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
    fingerprint: str = "",
) -> DataPipeline:
    """The pipeline whose iteration yields this rank's `Step`s start+worker, +workers, ... < stop.

    folder: a prepared folder or its URL; cache_gib: room on this disk for a URL's shards.
    Each Step has samples_per_step / world samples. With `stop=None` it never ends. Readers that
    take the workers' steps in turn see every step from `start` on, in order.
    fingerprint: of the data that is expected there; empty: any.

    Raises ConfigError when `world` does not divide `samples_per_step`, DataError when the split is
    missing, (strict) damaged or smaller than `samples_per_step`, or the data is not the expected.
    """
    assert start >= 0
    assert 0 <= rank < world
    assert 0 <= worker < workers
    check_world(samples_per_step, world)
    manifest = Manifest.load(folder, cache_gib)
    if fingerprint and manifest.fingerprint != fingerprint:
        raise DataError(
            f"{manifest.place} was prepared anew while the training started (data {fingerprint} -> "
            f"{manifest.fingerprint}); start it again"
        )
    if on_error == "strict":
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
    tars = Tars(manifest, split, partial=on_error == "skip")
    return DataPipeline(
        Draw(order, lanes=lanes, first=start + worker, stop=stop, stride=workers),
        Read(tars, on_error),
        Decode(tars, order, lanes, on_error),
    )


def check_world(samples_per_step: int, world: int) -> None:
    """Raise ConfigError unless `world` ranks can share the samples of a step evenly."""
    if samples_per_step % world:
        below = samples_per_step // world * world
        either = f"{below} or {below + world}" if below else str(world)
        raise ConfigError(
            f"samples_per_step={samples_per_step} is not a multiple of world={world} ranks; "
            f"use {either}"
        )
