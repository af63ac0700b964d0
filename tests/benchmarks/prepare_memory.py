"""Suite `prepare_memory`: peak memory of `lbr-ds prepare` on a corpus 20 times as large, over once.

Each prepare runs in a process of its own over a made-up corpus; its peak is that process's largest
resident size plus the largest sum of its helpers' while they live.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from lbr_ds.bench import Row
from lbr_ds.config import DataConfig
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import children

RECORDS = 10_000  # some pieces for each helper
_WORDS, _VOCABULARY = 60, 50_000  # in an answer; random words, hardly a near duplicate
_CORES = 2  # as many helpers for both sizes
_EVERY = 0.02  # seconds between two looks at the helpers
_MEASURE = (
    "import sys; from tests.benchmarks.prepare_memory import report_peak; report_peak(sys.argv[1])"
)
TIMES = 20  # how much larger the large corpus is
QUICK = {"times": 2, "records": RECORDS}


def suite(times: int = TIMES, records: int = RECORDS) -> list[Row]:
    """One row; minutes at times=20."""
    value, facts = peak_memory_ratio(times, records)
    return [
        Row(
            f"prepare_peak_memory_{times}x",
            value,
            "ratio",
            1.05,
            "lower",
            1.15,
            (value, value),
            1,
            f"peak resident MiB of `lbr-ds prepare`: {facts['large_mib']:.0f} on {times} times "
            f"{facts['records']} made-up records, {facts['small_mib']:.0f} on these",
        )
    ]


def peak_memory_ratio(times: int = 20, records: int = RECORDS) -> tuple[float, dict[str, Any]]:
    """Peak memory of preparing `times * records` records over that of `records`, and the figures.

    Raises EnvironmentProblem when a measurement fails.
    """
    figures: dict[str, Any] = {"records": records, "times": times}
    with tempfile.TemporaryDirectory(prefix="lbr-ds-scale-") as folder:
        for name, number in (("small", records), ("large", times * records)):
            place = Path(folder) / name
            place.mkdir()
            write_corpus(place / "corpus.jsonl", number)
            began = time.monotonic()
            figures[f"{name}_mib"] = round(_peak(place), 1)
            figures[f"{name}_seconds"] = round(time.monotonic() - began, 1)
    return figures["large_mib"] / figures["small_mib"], figures


def write_corpus(path: Path, records: int) -> None:
    """Write made-up pairs of 8 and 60 random words."""
    draw = random.Random(records)
    vocabulary = [f"w{number:05d}" for number in range(_VOCABULARY)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            words = draw.choices(vocabulary, k=8 + _WORDS)
            raw = {
                "id": str(number),
                "query": " ".join(words[:8]),
                "positives": [" ".join(words[8:])],
            }
            file.write(json.dumps(raw) + "\n")


def _peak(folder: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(folder)],
        env=children.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentProblem(f"prepare failed while its memory was measured: {reason}")
    return float(done.stdout)


def report_peak(folder: str) -> None:
    """Prepare `folder`/corpus.jsonl and write the peak in MiB to standard output."""
    from lbr_ds.corpora.formats import interface
    from lbr_ds.corpora.prepare import prepare

    interface.PIECE_BYTES = 1 << 20  # smaller, so that a small corpus fills pieces too
    children.follow_starter()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    place = Path(folder)
    sources = [{"path": str(place / "corpus.jsonl"), "license": "made up"}]
    data = DataConfig.model_validate({"folder": place / "data", "sources": sources})
    done = threading.Event()
    helpers = [0]

    def watch() -> None:
        while not done.wait(_EVERY):
            pids = [child.pid for child in multiprocessing.active_children()]
            helpers[0] = max(helpers[0], sum(_high_water(pid) for pid in pids))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        prepare(data, 0)
    finally:
        done.set()
        watcher.join()
    sys.stdout.write(f"{(_high_water('self') + helpers[0]) / 1024}\n")


def _high_water(pid: int | str | None) -> int:
    """The largest resident size of a process in KiB; 0 when it is gone.

    Not ru_maxrss: Linux hands a parent's down to what it starts.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) if found else 0
