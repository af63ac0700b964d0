"""Stream the samples of each step from shards, from any step on, in the order of `order.py`.

The pipeline is `webdataset.DataPipeline([Draw, Read, Decode])`, a step at a time: places, bytes by
pread, records. Lane l belongs to rank l % world, so the samples of a step do not depend on the
number of ranks, and the only state of a run's data is the number of its step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lbr_ds.config.mixing import Mixing
from lbr_ds.config.training import check_world
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards.manifest import Manifest
from lbr_ds.shards.mixture import Mixture, mixture_of
from lbr_ds.shards.order import Order, Place
from lbr_ds.shards.reader import Tars, decode, decode_valid
from lbr_ds.shards.sources import shard_sources, tracked_sources
from lbr_ds.system.urls import CACHE_GIB

if TYPE_CHECKING:
    from webdataset import DataPipeline

log = logging.getLogger(__name__)
_MAX_LOGGED = 10  # unreadable records that each loader process logs


class Sample(NamedTuple):
    """One record, the lane that drew it, that lane's epoch, and the record's place."""

    lane: int
    epoch: int
    record: Record
    shard: int
    row: int


@dataclass(frozen=True)
class Step:
    """A rank's samples of one optimizer step by ascending lane, `skipped` of them replacements.

    sources: The names of the split's sources, where there are several (`tracked_sources`).
    """

    index: int
    samples: list[Sample]
    skipped: int
    sources: tuple[str, ...] = ()


class Places(NamedTuple):
    """The places of the samples of one step, by ascending lane."""

    step: int
    places: list[Place]


class Raw(NamedTuple):
    """The samples of one step before they are decoded."""

    step: int
    places: list[Place]
    data: list[bytes]


class Draw:
    """First part of the pipeline: yield the places of a rank's samples for each step."""

    def __init__(
        self, order: Order | Mixture, *, lanes: range, first: int, stop: int | None, stride: int
    ) -> None:
        self.order = order
        self.lanes = lanes
        self.first, self.stop, self.stride = first, stop, stride

    def __call__(self) -> Iterator[Places]:
        """Yield the places of each step of this worker."""
        endless = count(self.first, self.stride)
        own = endless if self.stop is None else range(self.first, self.stop, self.stride)
        place, lanes = self.order.place, self.lanes
        for step in own:
            yield Places(step, [place(lane, step) for lane in lanes])


class Read:
    """Second part: read the bytes of the samples; with `skip`, b"" for an unreadable record."""

    def __init__(self, tars: Tars, on_error: Literal["strict", "skip"]) -> None:
        self.tars = tars
        self.on_error = on_error

    def __call__(self, drawn: Iterator[Places]) -> Iterator[Raw]:
        """Yield the bytes of each step."""
        for step, places in drawn:
            self._fetch(places)
            yield Raw(step, places, [self._read(shard, record) for _, shard, record in places])

    def _fetch(self, places: list[Place]) -> None:
        try:
            self.tars.fetch(place.shard for place in places)
        except DataError as error:
            raise _with_cure(error) from None

    def _read(self, shard: int, record: int) -> bytes:
        try:
            return self.tars.read(shard, record)
        except DataError as error:
            if self.on_error == "strict":
                raise _with_cure(error) from None
            return b""  # `Decode` tries once more and counts it


class Decode:
    """Third part: decode the bytes to records and yield Steps.

    A record that cannot be read (it, or its shard, is missing, truncated, altered or not JSON) ends
    the run (strict), or is counted and replaced by the next readable one (skip). The replacement is
    a pure function of the step, so that ranks stay synchronous and no other sample changes; the
    replacing record also occurs at its own step.
    """

    def __init__(
        self,
        tars: Tars,
        order: Order | Mixture,
        lanes: range,
        on_error: Literal["strict", "skip"],
        sources: tuple[str, ...],
    ) -> None:
        self.tars = tars
        self.order = order
        self.lanes = lanes
        self.on_error = on_error
        self.sources = sources
        self.num_logged = 0

    def __call__(self, raws: Iterator[Raw]) -> Iterator[Step]:
        """Yield each Step."""
        for raw in raws:
            records, skipped, places = decode_valid(raw.data), 0, raw.places
            if records is None:
                records, places, skipped = self._one_by_one(raw)
            drawn = zip(self.lanes, raw.places, records, places, strict=True)
            samples = [
                Sample(lane, turn[0], record, place[1], place[2])
                for lane, turn, record, place in drawn
            ]
            yield Step(raw.step, samples, skipped, self.sources)

    def _one_by_one(self, raw: Raw) -> tuple[list[Record], list[Place], int]:
        """Return records, places and number of replacements of a step with an unreadable record."""
        records, places, skipped = [], [], 0
        for lane, place in zip(self.lanes, raw.places, strict=True):
            try:
                record = self._record(place)
            except DataError as error:
                if self.on_error == "strict":
                    raise _with_cure(error) from None
                self._log(error)
                record, place = self._substitute(lane, raw.step, error)
                skipped += 1
            records.append(record)
            places.append(place)
        return records, places, skipped

    def _record(self, place: Place) -> Record:
        data = self.tars.read(place.shard, place.record)
        return decode(data, self.tars.where(place.shard, place.record))

    def _substitute(self, lane: int, step: int, error: DataError) -> tuple[Record, Place]:
        for attempt in range(1, 1 + self.order.replacements(lane, step)):
            place = self.order.place(lane, step, attempt)
            try:
                return self._record(place), place
            except DataError:
                continue
        raise DataError(f"{error}; no replacement for it can be read; run `lbr-ds prepare` again")

    def _log(self, error: DataError) -> None:
        """Log the first few skipped records."""
        self.num_logged += 1
        if self.num_logged <= _MAX_LOGGED:
            more = "; further ones are only counted" if self.num_logged == _MAX_LOGGED else ""
            log.warning("skipped: %s%s", error, more)


def _with_cure(error: DataError) -> DataError:
    again = "" if "lbr-ds prepare" in str(error) else "run `lbr-ds prepare` again, or "
    return DataError(f"{error}; {again}set data.on_error=skip to skip such records")


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
    mixing: Mixing | None = None,
) -> DataPipeline:
    """Return the pipeline that yields this rank's `Step`s start+worker, +workers, ... < stop.

    Taking the workers' steps in turn gives every step from `start` on, in order.

    Args:
        folder: A prepared folder or its URL.
        split: The split to read.
        seed: Decides the order.
        samples_per_step: Samples of a step on all ranks; a Step has samples_per_step / world.
        rank: This rank.
        world: The number of ranks.
        start: The first step.
        stop: The end of the steps; None: the pipeline never ends.
        worker: The loader process of this rank.
        workers: The number of loader processes of this rank.
        on_error: Whether an unreadable record ends the run or is replaced.
        cache_gib: Space on this disk for the shards of a URL.
        mixing: How to draw from several sources (`mixture.py`); None: every record once per epoch.

    Raises:
        ConfigError: `world` does not divide `samples_per_step`.
        DataError: The split is missing, (strict) damaged, or too small.
    """
    assert 0 <= rank < world
    assert start >= 0 <= worker < workers
    check_world(samples_per_step, world)
    manifest = Manifest.load(folder, cache_gib)
    _check_split(manifest, split, samples_per_step)
    order = _order(manifest, split, seed, samples_per_step, mixing)
    if on_error == "strict":  # a share of the check for each process of the job
        manifest.check(split, rank * workers + worker, world * workers)
    from webdataset import DataPipeline  # imports torch, which reading a manifest does not need

    lanes = range(rank, samples_per_step, world)
    tars = Tars(manifest, split, partial=on_error == "skip")
    return DataPipeline(
        Draw(order, lanes=lanes, first=start + worker, stop=stop, stride=workers),
        Read(tars, on_error),
        Decode(tars, order, lanes, on_error, tracked_sources(manifest, split)),
    )


def _order(
    manifest: Manifest, split: str, seed: int, lanes: int, mixing: Mixing | None
) -> Order | Mixture:
    shards = manifest.shards(split)
    if mixing is None:
        return Order([shard.records for shard in shards], seed=seed, lanes=lanes)
    _check_sources(manifest, split, lanes, mixing)
    return mixture_of(shards, mixing, seed=seed, lanes=lanes)


def _check_split(manifest: Manifest, split: str, samples_per_step: int) -> None:
    """Raise DataError unless the split can be read as `steps` describes."""
    total = manifest.records(split)
    if total < samples_per_step:
        raise DataError(
            f"{manifest.place}: split {split!r} has {total} records, fewer than "
            f"samples_per_step={samples_per_step}; lower samples_per_step or prepare more data"
        )


def _check_sources(manifest: Manifest, split: str, samples_per_step: int, mixing: Mixing) -> None:
    """Raise DataError unless the split can be drawn by source."""
    sizes = shard_sources(manifest.shards(split))
    if not sizes:
        raise DataError(
            f"{manifest.place}: its shards have records of several sources each, and the recipe "
            "draws by source (weight, data.size_exponent or stage2.homogeneous); run `lbr-ds "
            "prepare` again with this recipe"
        )
    smallest = min(sizes, key=lambda name: sizes[name])
    if mixing.homogeneous and sizes[smallest] < samples_per_step:
        raise DataError(
            f"{manifest.place}: source {smallest!r} has {sizes[smallest]} records in split "
            f"{split!r}, fewer than samples_per_step={samples_per_step} of a homogeneous step; "
            "lower samples_per_step, give two sources one name, or leave the source out"
        )
