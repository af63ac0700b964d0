"""Suite `stream`: 30,000 shards of 100 million records: start, resume, memory, order, shuffling.

The folder is real: every shard is a hard link to one tar, so that it takes no space, and
`trained.u64` has a hash for every record. What is read is therefore in the page cache. Seconds are
those of this machine under its present load; each figure is measured in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lbr_ds.bench import Row
from lbr_ds.bench.measure import Target, summary
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, ShardFile, steps, write_split
from lbr_ds.shards.order import WINDOW, Order
from lbr_ds.system import children
from tests.shards.quality import distinct_shards, quality
from tests.tiny import tiny_recipe

SHARDS, RECORDS, PER_STEP = 30_000, 3_334, 64
FAR = 1_000_000  # the step of a resume
READ = 200  # steps that a loader process has read when its memory is measured
QUICK = {"shards": 30, "records": 50, "per_step": 8, "rounds": 1, "train": False}
_START = Target("stream_train_start", 20.0, 15.0, "lower", "command to first step", "s")
_RESUME = Target("stream_train_resume_over_start", 1.0, 0.9, "lower", "the same, resumed")
_SMALL = Target("stream_train_start_over_small", 1.5, 1.1, "lower", "over that of one shard")
_DATA = Target("stream_data_start", 2.0, 1.0, "lower", "folder to first batch", "s")
_FAR = Target("stream_data_resume_over_start", 1.1, 1.0, "lower", "at step 1,000,000 over 0")
_RANK = Target("stream_memory_rank", 200.0, 50.0, "lower", "manifest and order", "MiB")
_LOADER = Target("stream_memory_loader", 200.0, 100.0, "lower", "and indexes", "MiB")
_ORDER = Target("stream_order", 10.0, 3.0, "lower", "the order of a sample", "us")
_SPAN = Target("stream_shard_span", 0.5, 0.9, "higher", "steps of a shard over a window")
_DISTINCT = Target("stream_distinct_shards", 0.9, 1.0, "higher", "in a step, of what is possible")
_LAG = Target("stream_autocorrelation", 0.05, 0.02, "lower", "of a lane's record numbers")


def suite(
    shards: int = SHARDS,
    records: int = RECORDS,
    per_step: int = PER_STEP,
    rounds: int = 5,
    *,
    train: bool = True,
) -> list[Row]:
    """Eleven rows; about three minutes, most of them for the starts of `lbr-ds train`."""
    with tempfile.TemporaryDirectory(prefix="lbr-ds-stream-") as name:
        place = Path(name)
        recipe = tiny_recipe(place, prepared=False, **_settings(per_step))
        make(place / "data", shards, records)
        what = f"{shards:,} shards, {shards * records:,} records, {per_step} samples a step"
        rows = _data_rows(place / "data", per_step, rounds, what)
        rows += _order_rows(Order([records] * shards, seed=0, lanes=per_step), rounds, what)
        if train:
            make(place / "small", 1, records)
            rows += _train_rows(recipe, rounds, what)
    return rows


def _settings(per_step: int) -> dict[str, Any]:
    every = {"save": 100_000, "keep": 1, "log": 1, "evaluate": None}
    return {
        "every": every,
        "stage1__samples_per_step": per_step,
        "stage1__num_steps": 2 * FAR,
        "data__workers": 1,
    }


def make(folder: Path, shards: int, records: int) -> None:
    """Write a folder of `shards` names of one tar of `records` records."""
    texts = [
        Record(
            id=f"r{i}", source="made up", query=f"what is {i}?", positives=[f"passage {i} of many"]
        )
        for i in range(records)
    ]
    (one,) = write_split(folder, "gl", texts, seed=0, records_per_shard=records)
    listed = [ShardFile(f"gl/{i:05d}.tar", records, one.bytes, one.sha256) for i in range(shards)]
    for shard in listed[1:]:
        for suffix in (".tar", ".idx"):
            path = (folder / one.file).with_suffix(suffix)
            os.link(path, (folder / shard.file).with_suffix(suffix))
    Manifest(folder, {"gl": listed}, [], 0, "0" * 16, "made up").save()
    hashes = np.arange(shards * records, dtype=np.uint64) << np.uint64(30)
    trained_texts.save([trained_texts.TrainedTexts("0" * 16, hashes)], folder)
    Manifest.load(folder).with_file(trained_texts.NAME).save()


def _data_rows(data: Path, per_step: int, rounds: int, what: str) -> list[Row]:
    runs = [(_child(data, per_step, 0), _child(data, per_step, FAR)) for _ in range(rounds)]
    about = f"{what}, in a process that has imported the libraries"
    return [
        _DATA.row([near["seconds"] for near, _ in runs], about=f"{about}: manifest, check, batch"),
        _FAR.row([far["cpu"] / near["cpu"] for near, far in runs], about=f"{about}: process time"),
        _RANK.row([far["rank_mib"] for _, far in runs], about=f"{about}: resident memory added"),
        _LOADER.row(
            [far["loader_mib"] for _, far in runs],
            about=f"{about}: the same after {READ} steps at step {FAR:,}, indexes included",
        ),
    ]


def _child(data: Path, per_step: int, start: int) -> dict[str, float]:
    code = "import sys; from tests.benchmarks.stream import report; report(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(data), str(per_step), str(start)],
        env=children.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentProblem(f"the stream could not be measured: {reason}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def report(data: str, per_step: str, start: str) -> None:
    """Read the data from step `start` and write seconds and MiB as JSON to standard output."""
    children.follow_starter()
    import webdataset  # noqa: F401 - its import is not what is measured

    lanes, first = int(per_step), int(start)
    before, began, used = _resident(), time.perf_counter(), time.process_time()
    pipe = iter(steps(data, "gl", seed=0, samples_per_step=lanes, rank=0, world=1, start=first))
    rank = _resident()
    assert len(next(pipe).samples) == lanes
    figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
    for _ in range(READ):
        next(pipe)
    figures |= {"rank_mib": rank - before, "loader_mib": _resident() - before}
    sys.stdout.write(json.dumps(figures) + "\n")


def _resident() -> float:
    """Resident memory in MiB; in figures above it includes what parsing has left behind."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1]) / 1024


def _order_rows(order: Order, rounds: int, what: str) -> list[Row]:
    """The cost of a sample, blocks included, and the quality of the first windows."""
    times = []
    for turn in range(rounds):
        first = (turn + 1) * FAR
        began = time.process_time()
        for step in range(first, first + WINDOW):
            order.place(turn % order.lanes, step)
        times.append((time.process_time() - began) / WINDOW * 1e6)
    length = order.total // order.lanes
    found = quality(order, range(min(4, order.lanes)), range(min(4 * WINDOW, length)))
    about = f"{what}; {min(4 * WINDOW, length):,} of a lane's {length:,} steps an epoch"
    return [
        _ORDER.row(times, about=f"{what}: process time over the {WINDOW} samples of a window"),
        _SPAN.row([found.span / min(WINDOW, length)], about=about),
        _DISTINCT.row(
            [distinct_shards(order, range(min(256, length)))],
            about=f"{what}: the fewest of 256 steps",
        ),
        _LAG.row([found.neighbours], about=about),
    ]


def _train_rows(recipe: Path, rounds: int, what: str) -> list[Row]:
    """Start and resume `lbr-ds train` until its next step is done, then stop it by a signal."""
    place, times = recipe.parent, []
    for turn in range(max(1, rounds // 2)):
        small = _until_step(recipe, place / f"small-run-{turn}", place / "small")
        run = place / f"run-{turn}"
        times.append((small, *(_until_step(recipe, run, place / "data") for _ in range(2))))
    about = f"`lbr-ds train` of a tiny model on {what}, one rank: seconds to the end of a step"
    _, one, _ = summary([small for small, *_ in times])
    return [
        _START.row([start for _, start, _ in times], about=f"{about}, imports included"),
        _SMALL.row(
            [start / small for small, start, _ in times],
            about=f"{about}, over that on one shard ({one:.1f} s)",
        ),
        _RESUME.row(
            [resume / start for _, start, resume in times],
            about=f"{about}, from a checkpoint, over the first start",
        ),
    ]


def _until_step(recipe: Path, run: Path, data: Path) -> float:
    metrics = run / "stage1" / "metrics.jsonl"
    known, began = _lines(metrics), time.perf_counter()
    command = [sys.executable, "-m", "lbr_ds", "train", str(recipe), "--stage", "1"]
    command += [f"run={run}", f"data.folder={data}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=children.environment(), stdout=log, stderr=log)
        try:
            _wait(lambda: _lines(metrics) > known or process.poll() is not None)
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGUSR1)
            process.wait(120)
        finally:
            process.kill()
        log.seek(0)
        if _lines(metrics) == known:
            reason = (log.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            raise EnvironmentProblem(f"`lbr-ds train` took no step: {reason}")
    return seconds


def _wait(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(0.02)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
