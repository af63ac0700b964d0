"""Suite `loader`: our stream against plain webdataset, and far positions against near ones.

1. loader_over_webdataset: samples/s of one thread over one epoch of the split `gl`; both decode
   the JSON, ours also shuffles and checks.
2. seek_far_over_near: time to the first step at position 10^6 over that at position 10. The split
   is smaller than that, so the far position is in a later epoch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from lbr_ds.bench.measure import Row, Target, interleaved
from lbr_ds.bench.setting import Setting
from lbr_ds.config import load
from lbr_ds.shards import Manifest, steps

SPLIT = "gl"
LANES = 64  # samples a step where throughput is measured
NEAR, FAR = 10, 10**6  # positions in samples


def measure(target: Target, setting: Setting) -> Row:
    """Measure a row on a prepared folder; without one on the demo's corpus, prepared for this."""
    data = setting.shared("data", lambda: _prepared(setting.data))
    row = _throughput if target.measure == "loader_over_webdataset" else _seek
    return row(target, data, setting.rounds)


@contextmanager
def _prepared(data: Path | None) -> Iterator[Path]:
    if data is not None:
        yield data
        return
    from lbr_ds.corpora.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        run = load("demo", [f"data.folder={folder}/data"])
        prepare(run.data, run.seed)
        yield run.data.local_folder


def _throughput(target: Target, data: Path, rounds: int) -> Row:
    manifest = Manifest.load(data)
    count = manifest.records(SPLIT)
    lanes = min(LANES, count)
    pairs = interleaved(_ours(data, lanes, count), _webdataset(manifest), rounds)
    return target.ratio(
        pairs,
        about=f"samples/s over {count} records, {lanes} a step, one thread, page cache warm",
    )


def _ours(data: Path, lanes: int, count: int) -> Callable[[], float]:
    def run() -> float:
        begin, seen = perf_counter(), 0
        pipeline = steps(
            data, SPLIT, seed=0, samples_per_step=lanes, rank=0, world=1, stop=count // lanes
        )
        for step in pipeline:
            seen += len(step.samples)
        return seen / (perf_counter() - begin)

    return run


def _webdataset(manifest: Manifest) -> Callable[[], float]:
    from webdataset import WebDataset

    tars = [str(manifest.file(shard)) for shard in manifest.shards(SPLIT)]

    def run() -> float:
        begin, seen = perf_counter(), 0
        for sample in WebDataset(tars, shardshuffle=False):
            seen += bool(json.loads(sample["json"]))
        return seen / (perf_counter() - begin)

    return run


def _seek(target: Target, data: Path, rounds: int) -> Row:
    lanes = min(NEAR, Manifest.load(data).records(SPLIT))
    pairs = interleaved(_first(data, lanes, FAR), _first(data, lanes, NEAR), rounds)
    return target.ratio(
        pairs,
        about=f"time to open and read the step at sample {FAR} over that at {NEAR}, {lanes} a step",
    )


def _first(data: Path, lanes: int, position: int, repeats: int = 20) -> Callable[[], float]:
    """Return a function that times opening the data and reading the step at sample `position`."""
    start = position // lanes

    def run() -> float:
        begin = perf_counter()
        for _ in range(repeats):
            next(
                iter(
                    steps(data, SPLIT, seed=0, samples_per_step=lanes, rank=0, world=1, start=start)
                )
            )
        return (perf_counter() - begin) / repeats

    return run
