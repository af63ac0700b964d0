"""Suite `loader`: our stream against plain webdataset, and far positions against near ones.

1. loader_over_webdataset: samples/s of one thread over one epoch of the split `gl`; both decode
   the JSON, ours also shuffles and checks.
2. seek_far_over_near: time to the first step at position 10^6 over that at position 10. The split
   is smaller than that, so the far position is in a later epoch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from lbr_ds.bench.measure import ROUNDS, Row, interleaved, ratio
from lbr_ds.config import load
from lbr_ds.shards import Manifest, steps

SPLIT = "gl"
LANES = 64  # samples a step where throughput is measured
NEAR, FAR = 10, 10**6  # positions in samples
QUICK = {"rounds": 3}


def suite(data: Path | None = None, rounds: int = ROUNDS) -> list[Row]:
    """Measure both rows on a prepared folder; None: the demo's corpus, prepared for this."""
    if data is None:
        from lbr_ds.corpora.prepare import prepare

        with tempfile.TemporaryDirectory() as folder:
            run = load("demo", [f"data.folder={folder}/data"])
            prepare(run.data, run.seed)
            return suite(run.data.local_folder, rounds)
    return [_throughput(data, rounds), _seek(data, rounds)]


def _throughput(data: Path, rounds: int) -> Row:
    manifest = Manifest.load(data)
    count = manifest.records(SPLIT)
    lanes = min(LANES, count)
    pairs = interleaved(_ours(data, lanes, count), _webdataset(manifest), rounds)
    return ratio(
        "loader_over_webdataset",
        pairs,
        goal=6.0,
        better="higher",
        floor=4.0,
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


def _seek(data: Path, rounds: int) -> Row:
    lanes = min(NEAR, Manifest.load(data).records(SPLIT))
    pairs = interleaved(_first(data, lanes, FAR), _first(data, lanes, NEAR), rounds)
    return ratio(
        "seek_far_over_near",
        pairs,
        goal=1.1,
        better="lower",
        floor=1.2,
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
