"""Sources drawn by weight against brute force: counts, order, ranks, resume, replacements."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from lbr_ds.config.mixing import Mixing
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, Step, read_split, steps, write_split
from lbr_ds.shards import mixture as room
from lbr_ds.shards.mixture import Mixture, mixture_of, turns_of
from lbr_ds.shards.order import Order
from lbr_ds.shards.sources import shard_sources

SIZES = {"a": 40, "b": 17, "c": 5}
BLOCK = 64  # turns, so that several blocks are read
WEIGHTS = {"b": 3.0, "c": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "data"
    records = [
        Record(id=f"{name}{i}", source=name, query=f"{name} {i}?", positives=[f"{name} {i}"])
        for name, size in SIZES.items()
        for i in range(size)
    ]
    sources = [record.source for record in records]
    shards = write_split(folder, "cl", records, seed=5, records_per_shard=8, sources=sources)
    Manifest(folder, {"cl": shards}, [], 5, "print", "test").save()
    return folder


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TURNS", BLOCK)


def read(
    folder: Path,
    rule: Mixing,
    lanes: int = 6,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    stop: int = 60,
    on_error: str = "strict",
) -> list[Step]:
    pipe = steps(
        folder,
        "cl",
        seed=3,
        samples_per_step=lanes,
        rank=rank,
        world=world,
        start=start,
        stop=stop,
        mixing=rule,
        on_error=on_error,
    )
    return list(pipe)


def names(found: list[Step]) -> list[list[tuple[int, int, str]]]:
    return [[(s.lane, s.epoch, s.record.id) for s in step.samples] for step in found]


def test_shards_are_of_one_source_and_hold_every_record_once(folder: Path) -> None:
    manifest = Manifest.load(folder)
    assert shard_sources(manifest.shards("cl")) == SIZES
    records = iter(list(read_split(folder, "cl")))
    for shard in manifest.shards("cl"):
        assert {next(records).source for _ in range(shard.records)} == {shard.source}
    assert len({record.id for record in read_split(folder, "cl")}) == sum(SIZES.values())
    assert [shard.records for shard in manifest.shards("cl")] == [8] * 5 + [8, 8, 1, 5]


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (1.0,), (0.999, 0.0005, 0.0005), (1 / 3,) * 3])
def test_turns_are_the_largest_remainders(shares: tuple[float, ...]) -> None:
    turns = turns_of(shares).tolist()
    assert sum(turns) == BLOCK
    assert min(turns) >= 1
    quotas = [share * BLOCK for share in shares]
    if min(quotas) >= 1:
        assert all(abs(t - q) < 1 for t, q in zip(turns, quotas, strict=True))
        up = [q % 1 for t, q in zip(turns, quotas, strict=True) if t > q]
        down = [q % 1 for t, q in zip(turns, quotas, strict=True) if t < q]
        assert min(up, default=1) >= max(down, default=0)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_counts_in_closed_form_equal_counting(homogeneous: bool) -> None:
    """Also across blocks, and never far from the shares."""
    shares = Mixing(WEIGHTS).shares(SIZES)
    sizes = list(SIZES.values())
    order = Mixture(sizes, list(SIZES), shares, seed=1, lanes=4, homogeneous=homogeneous)
    counted: Counter[str] = Counter()
    for step in range(300):
        assert order.drawn(step) == {name: counted[name] for name in SIZES}
        done = step * (1 if homogeneous else 4)
        for name, turns in zip(order.names, order.turns, strict=True):
            each = 4 if homogeneous else 1
            late = abs(counted[name] / each - done * turns / BLOCK)
            assert late <= 1 + len(SIZES) * turns / BLOCK
        for lane in range(4):
            counted[order.names[order.place(lane, step).shard]] += 1


@pytest.mark.parametrize("homogeneous", [False, True])
def test_every_source_is_read_through_before_it_is_read_again(
    folder: Path, homogeneous: bool
) -> None:
    lanes = 5 if homogeneous else 6
    seen: dict[str, dict[int, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for _, epoch, name in chain(
        *names(read(folder, Mixing(WEIGHTS, 1, homogeneous), lanes, stop=200))
    ):
        seen[name[0]][epoch][name] += 1
    for source, size in SIZES.items():
        epochs = seen[source]
        whole = Counter({f"{source}{i}": 1 for i in range(size)})
        assert [epochs[epoch] for epoch in range(2)] == [whole] * 2
        assert all(max(epoch.values()) == 1 for epoch in epochs.values())
    total = {source: sum(map(Counter.total, epochs.values())) for source, epochs in seen.items()}
    shards = Manifest.load(folder).shards("cl")
    order = mixture_of(shards, Mixing(WEIGHTS, 1, homogeneous), seed=3, lanes=lanes)
    assert total == order.drawn(200)


def test_turns_interleave_by_brute_force() -> None:
    """The order written out: keys of every source's turns, sorted."""
    shares = Mixing(WEIGHTS).shares(SIZES)
    order = Mixture(list(SIZES.values()), list(SIZES), shares, seed=1, lanes=3)
    alone = {
        name: Order([size], seed=order._seed(name), lanes=own.lanes)
        for (name, size), own in zip(SIZES.items(), order.orders, strict=True)
    }
    drawn: Counter[str] = Counter()
    expected = []
    for block in range(3):
        keys = []
        for name, turns in zip(SIZES, order.turns.tolist(), strict=True):
            jitter = order._uniform(name, block, turns)
            keys += [((i + jitter[i]) / turns, name) for i in range(turns)]
        for _, name in sorted(keys):
            own, lanes = alone[name], alone[name].lanes
            place = own.place(drawn[name] % lanes, drawn[name] // lanes)
            expected.append(place._replace(shard=list(SIZES).index(name)))
            drawn[name] += 1
    assert [order.place(turn % 3, turn // 3) for turn in range(3 * BLOCK)] == expected


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_world_and_start_have_no_say(folder: Path, homogeneous: bool, world: int) -> None:
    rule = Mixing(WEIGHTS, 0.5, homogeneous)
    alone = names(read(folder, rule, 4))
    ranks = [names(read(folder, rule, 4, rank=rank, world=world)) for rank in range(world)]
    assert [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)] == alone
    for start in (1, 17, 59):
        assert names(read(folder, rule, 4, start=start)) == alone[start:]


def test_homogeneous_steps_are_of_one_source(folder: Path) -> None:
    found = names(read(folder, Mixing(WEIGHTS, 1, True), 4, stop=64))
    kinds = [{name[0] for *_, name in step} for step in found]
    assert all(len(kind) == 1 for kind in kinds)
    turns = turns_of(list(Mixing(WEIGHTS).shares(SIZES).values()))
    assert [sum(kind == {name} for kind in kinds) for name in SIZES] == turns.tolist()
    assert any(
        {name[0] for *_, name in step} > {"a"} for step in names(read(folder, Mixing(WEIGHTS)))
    )


def test_shares() -> None:
    sizes = {"a": 100, "b": 400}
    assert Mixing().shares(sizes) == {"a": 0.2, "b": 0.8}
    assert Mixing({"a": 4}).shares(sizes) == {"a": 0.5, "b": 0.5}
    assert Mixing({}, 0.5).shares(sizes) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert Mixing({"a": 0.3, "b": 0.7}, 0).shares(sizes) == {"a": 0.3, "b": 0.7}


def test_a_new_source_leaves_the_order_of_the_others(folder: Path) -> None:
    """Sample j of a source is the same whatever else is drawn, with equal lanes."""
    one, two = (
        Mixture(sizes, list("ab")[: len(sizes)], dict.fromkeys("ab", 0.5), seed=1, lanes=1)
        for sizes in ([40], [40, 17])
    )
    firsts = [[p for p in places(order, 80) if p.shard == 0][:30] for order in (one, two)]
    assert firsts[0] == firsts[1]


def places(order: Mixture, count: int) -> list[room.Place]:
    return [order.place(0, step) for step in range(count)]


def test_blocks_are_spread_and_drawn_anew() -> None:
    order = Mixture([40, 40], list("ab"), {"a": 0.5, "b": 0.5}, seed=1, lanes=1)
    owners = [order._block(number).owner for number in range(4)]
    assert len({tuple(owner) for owner in owners}) == 4
    for owner in owners:
        runs = np.diff(np.flatnonzero(np.diff(owner, prepend=-1, append=-1)))
        assert runs.max() <= 4  # at most two turns of a source from either side of a border


def broken(folder: Path, target: Path, source: str) -> Path:
    """A copy whose first shard of `source` is missing."""
    shutil.copytree(folder, target)
    shard = next(s for s in Manifest.load(target).shards("cl") if s.source == source)
    (target / shard.file).unlink()
    return target


def test_a_replacement_is_of_the_same_source(folder: Path, tmp_path: Path) -> None:
    damaged = broken(folder, tmp_path / "data", "b")
    rule = Mixing(WEIGHTS)
    found, whole = read(damaged, rule, on_error="skip"), read(folder, rule)
    assert sum(step.skipped for step in found) > 0
    for ours, theirs in zip(found, whole, strict=True):
        changed = 0
        for sample, wanted in zip(ours.samples, theirs.samples, strict=True):
            assert sample.record.source == wanted.record.source
            changed += sample.record != wanted.record
        assert changed == ours.skipped
    halves = [read(damaged, rule, rank=rank, world=2, on_error="skip") for rank in range(2)]
    both = [sorted(chain(*parts)) for parts in zip(*map(names, halves), strict=True)]
    assert both == names(found)
    with pytest.raises(DataError, match="no replacement for it"):
        read(broken(folder, tmp_path / "c", "c"), rule, on_error="skip")


def test_what_cannot_be_drawn_by_source_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'c' has 5 records in split 'cl', fewer than .*=6"):
        read(folder, Mixing({}, 1, True))
    mixed = tmp_path / "mixed"
    records = list(read_split(folder, "cl"))
    shards = write_split(mixed, "cl", records, seed=5, records_per_shard=8)
    Manifest(mixed, {"cl": shards}, [], 5, "print", "test").save()
    assert (
        "source"
        not in json.loads((mixed / "manifest.json").read_text())["splits"]["cl"]["shards"][0]
    )
    with pytest.raises(DataError, match=r"records of several sources each.*lbr-ds prepare"):
        read(mixed, Mixing(WEIGHTS))
