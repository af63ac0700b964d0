"""The order of samples against oracles: every record once, whoever reads, from wherever."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lbr_ds.errors import ConfigError, DataError
from lbr_ds.shards import Manifest, Step, read_split, steps
from lbr_ds.shards import order as order_module
from lbr_ds.shards.order import BLOCK, Order, permutation
from tests.shards.toy import Loaded

TOTAL = 103
PINNED = [5, 4, 1, 0, 2, 6, 3, 7]


def read(
    folder: Path,
    per_step: int,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 3,
    start: int = 0,
    stop: int = 60,
    workers: int = 1,
) -> list[Step]:
    """One rank's steps, its workers read in turn as a torch DataLoader does."""
    pipes = [
        iter(
            steps(
                folder,
                "gl",
                seed=seed,
                samples_per_step=per_step,
                rank=rank,
                world=world,
                start=start,
                stop=stop,
                worker=worker,
                workers=workers,
            )
        )
        for worker in range(workers)
    ]
    found: list[Step] = []
    for pipe in itertools.cycle(pipes):
        step = next(pipe, None)
        if step is None:
            return found
        found.append(step)
    raise AssertionError


def ids(found: list[Step]) -> list[list[tuple[int, int, str]]]:
    return [[(s.lane, s.epoch, s.record.id) for s in step.samples] for step in found]


@pytest.mark.parametrize("per_step", [1, 6, 10, 64, 103])
def test_every_record_once_an_epoch(shared_prepared: Path, per_step: int) -> None:
    everything = Counter(record.id for record in read_split(shared_prepared, "gl"))
    assert len(everything) == TOTAL
    long_enough = 3 * -(-TOTAL // per_step)  # the longest chunk, three times
    seen: dict[int, Counter[str]] = {0: Counter(), 1: Counter(), 2: Counter()}
    for step in ids(read(shared_prepared, per_step, stop=long_enough)):
        for _, epoch, name in step:
            if epoch in seen:
                seen[epoch][name] += 1
    assert list(seen.values()) == [everything] * 3


@pytest.mark.parametrize(("per_step", "world"), [(6, 2), (6, 3), (12, 4), (20, 5)])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_world_and_workers_have_no_say(
    shared_prepared: Path, per_step: int, world: int, workers: int
) -> None:
    alone = ids(read(shared_prepared, per_step, stop=25))
    ranks = [
        ids(read(shared_prepared, per_step, stop=25, rank=r, world=world, workers=workers))
        for r in range(world)
    ]
    together = [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == alone
    for rank, own in enumerate(ranks):
        lanes = list(range(rank, per_step, world))
        assert all([lane for lane, _, _ in step] == lanes for step in own)


@pytest.mark.parametrize("start", [1, 16, 17, 59])
@pytest.mark.parametrize("workers", [1, 2])
def test_jump_equals_reading_through(shared_prepared: Path, start: int, workers: int) -> None:
    through = read(shared_prepared, 6, rank=1, world=2)
    jumped = read(shared_prepared, 6, rank=1, world=2, start=start, workers=workers)
    assert jumped == through[start:]
    assert [step.index for step in jumped] == list(range(start, 60))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_torch_loader_sees_the_steps_in_order(shared_prepared: Path, workers: int) -> None:
    loader = DataLoader(Loaded(shared_prepared), batch_size=None, num_workers=workers)
    assert list(loader) == read(shared_prepared, 6, rank=1, world=2, start=5, stop=41)


def test_blocks_are_windows_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "WINDOW", 8)
    order = Order([40, 7, 23], seed=1, lanes=3)  # chunks of 23, 23 and 24: a cut last block each
    for epoch in range(2):
        shards, starts = order._epoch(epoch)
        begin = dict(zip(shards, starts, strict=True))
        drawn: list[int] = []
        for lane, length in enumerate([23, 23, 24]):
            places = [order.place(lane, epoch * length + i) for i in range(length)]
            assert {place.epoch for place in places} == {epoch}
            positions = [begin[place.shard] + place.record for place in places]
            first = lane * 70 // 3
            for block in range(0, length, 8):
                expected = range(first + block, first + min(block + 8, length))
                assert sorted(positions[block : block + 8]) == list(expected)
            drawn += positions
        assert sorted(drawn) == list(range(70))


def test_shards_and_blocks_are_drawn_anew() -> None:
    order = Order([5000] * 4, seed=1, lanes=1)
    assert len({tuple(order._epoch(epoch)[0]) for epoch in range(20)}) > 10
    draws = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]  # lane, epoch, block
    assert len({tuple(order._block(*draw, 4096).tolist()) for draw in draws}) == 4


def test_epochs_and_seeds_differ(shared_prepared: Path) -> None:
    names = [name for step in ids(read(shared_prepared, 1, stop=2 * TOTAL)) for *_, name in step]
    assert names[:TOTAL] != names[TOTAL:]
    other = ids(read(shared_prepared, 1, stop=TOTAL, seed=4))
    assert names[:TOTAL] != [name for step in other for *_, name in step]


def test_permutation_is_pinned() -> None:
    """A change here would silently reorder the data of runs that resume."""
    assert permutation(8, 0, BLOCK, 0, 0, 0).tolist() == PINNED
    assert permutation(8, 2**64, BLOCK, 0, 0, 0).tolist() == PINNED  # seeds are 64 bits
    assert sorted(permutation(5000, -1, BLOCK, 1, 2, 3).tolist()) == list(range(5000))


def test_endless_without_stop_and_repeatable(shared_prepared: Path) -> None:
    pipe = steps(shared_prepared, "gl", seed=3, samples_per_step=6, rank=0, world=1)
    first = list(itertools.islice(iter(pipe), 60))
    assert first == list(itertools.islice(iter(pipe), 60)) == read(shared_prepared, 6)


def test_pipeline_is_picklable_stages(shared_prepared: Path) -> None:
    pipe = steps(shared_prepared, "gl", seed=3, samples_per_step=6, rank=0, world=1, stop=5)
    names = [type(stage).__name__ for stage in pipe.pipeline]
    assert names == ["Draw", "Read", "Decode"]
    expected = list(pipe)  # its files are open now
    assert list(pickle.loads(pickle.dumps(pipe))) == expected


def test_few_open_files(shared_prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_ds.shards.reader._OPEN_FILES", 1)
    pipe = steps(shared_prepared, "gl", seed=3, samples_per_step=6, rank=0, world=1, stop=60)
    assert list(pipe) == read(shared_prepared, 6)
    assert len(pipe.pipeline[1].tars._files) == 1


def test_few_indexes_in_memory(shared_prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were opened last, 20 bytes a record: an epoch does not collect all of them."""
    monkeypatch.setattr("lbr_ds.shards.reader._INDEX_BYTES", 20 * 70)
    pipe = steps(shared_prepared, "gl", seed=3, samples_per_step=6, rank=0, world=1, stop=60)
    tars = pipe.pipeline[1].tars
    for step, expected in zip(pipe, read(shared_prepared, 6), strict=True):
        assert step == expected
        held = 20 * sum(tars.shards[shard].records for shard in tars._known)
        assert held == tars._held <= 20 * 70
        assert set(tars._files) <= set(tars._known)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_the_processes_of_a_job_share_the_check(prepared: Path, world: int, workers: int) -> None:
    """A missing shard is found before it is read, by exactly one of them."""
    (prepared / "gl" / "00001.tar").unlink()
    found: list[DataError] = []
    for rank, worker in itertools.product(range(world), range(workers)):
        try:
            steps(
                prepared,
                "gl",
                seed=3,
                samples_per_step=6,
                rank=rank,
                world=world,
                worker=worker,
                workers=workers,
            )
        except DataError as error:
            found.append(error)
    (only,) = found
    assert "gl/00001.tar: the manifest names this shard and it is missing" in str(only)


def test_world_must_divide(shared_prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"samples_per_step=10 .* world=4 ranks; use 8 or 12"):
        steps(shared_prepared, "gl", seed=0, samples_per_step=10, rank=0, world=4)
    with pytest.raises(ConfigError, match=r"samples_per_step=3 .* world=4 ranks; use 4$"):
        steps(shared_prepared, "gl", seed=0, samples_per_step=3, rank=0, world=4)


def test_split_must_fill_a_step(shared_prepared: Path) -> None:
    with pytest.raises(DataError, match="has 103 records, fewer than samples_per_step=104"):
        steps(shared_prepared, "gl", seed=0, samples_per_step=104, rank=0, world=1)
    with pytest.raises(DataError, match="no split 'test'; it has gl"):
        steps(shared_prepared, "test", seed=0, samples_per_step=1, rank=0, world=1)
    assert Manifest.load(shared_prepared).records("gl") == TOTAL
