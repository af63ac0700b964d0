"""Suite `prepare`: what `lbr-ds prepare` costs per record, and what it finds, as a corpus grows.

Each corpus (`scale_corpus.py`) is prepared in a process of its own, which reports the CPU seconds
of each step (its own and those of its helpers), the wall time, and the peak of the resident memory
of all processes. The finished shards are compared with what was planted.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from lbr_ds.bench.measure import Row
from lbr_ds.config import DataConfig
from lbr_ds.corpora.curate.segmentation import similarity
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.shards import Manifest, read_split
from lbr_ds.system import children
from tests.benchmarks.scale_corpus import Planted, Recombined, write_corpus

log = logging.getLogger(__name__)
SIZES = (100_000, 1_000_000)
QUICK = {"passages": (3000,)}
_THRESHOLD = 0.7
_EVERY = 0.2  # seconds between two looks at the memory
_MEASURE = "import sys; from tests.benchmarks.prepare import report; report(sys.argv[1])"
_MIB = 1 << 20
_JUDGED = 20_000  # planted pairs and pairs found that are compared with the exact index


def suite(data: Path | None = None, passages: tuple[int, ...] = SIZES) -> list[Row]:
    """Rows of each size, and the growth from the first to the last."""
    from tests.benchmarks.texts import real_passages  # imports torch; `report` shall not

    rows: list[Row] = []
    made = Recombined(real_passages(data), seed=1)
    costs = []
    for count in passages:
        with tempfile.TemporaryDirectory(prefix="lbr-ds-prepare-") as folder:
            planted = write_corpus(Path(folder) / "corpus.jsonl", made, count)
            facts = measure(Path(folder))
            found = judge(Path(folder) / "data", made, count, planted)
        costs.append(facts["cpu_seconds"] / count)
        log.info("%d passages: %s", count, json.dumps({**facts, **found}))
        rows += _rows(count, facts, found)
    if len(passages) > 1:
        growth = costs[-1] / costs[0]
        about = f"CPU time per record at {passages[-1]:,} over that at {passages[0]:,}"
        rows.append(_row("prepare_growth", growth, "ratio", "lower", (1.0, 1.2), about))
    return rows


def _rows(count: int, facts: dict[str, Any], found: dict[str, float]) -> list[Row]:
    name = f"prepare_{count}"
    steps = ", ".join(f"{step} {1e6 * cpu / count:.0f}" for step, cpu in facts["steps"].items())
    rate = count / facts["cpu_seconds"]
    memory, disk = facts["peak_bytes"] / _MIB, facts["work_bytes"] / facts["corpus_bytes"]
    planted = f"{found['planted']:,.0f} planted, index {_THRESHOLD} or more"
    return [
        _row(f"{name}_rate", rate, "records per CPU second", "higher", (4000, 2000), steps + " us"),
        _row(f"{name}_memory", memory, "MiB", "lower", (1024, 1536), "RSS of all processes"),
        _row(f"{name}_disk", disk, "ratio", "lower", (4, 6), "peak of the work folder / corpus"),
        _row(f"{name}_recall", found["recall"], "share", "higher", (0.999, 0.99), planted),
        _row(f"{name}_precision", found["precision"], "share", "higher", (1, 0.999), planted),
    ]


def _row(
    name: str, value: float, unit: str, better: Any, targets: tuple[float, float], about: str
) -> Row:
    goal, floor = targets
    return Row(name, value, unit, goal, better, floor, (value, value), 1, about)


def measure(folder: Path) -> dict[str, Any]:
    """Prepare `folder/corpus.jsonl` into `folder/data` in another process; return its report.

    Raises:
        EnvironmentProblem: It failed.
    """
    command = [sys.executable, "-c", _MEASURE, str(folder)]
    done = subprocess.run(command, env=children.environment(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise EnvironmentProblem(f"prepare of {folder} failed with code {done.returncode}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def report(folder: str) -> None:
    """Prepare `folder`/corpus.jsonl and write what it cost to standard output as JSON."""
    from lbr_ds.corpora.prepare import prepare

    children.follow_starter()
    place = Path(folder)
    corpus = place / "corpus.jsonl"
    data = DataConfig.model_validate(
        {
            "folder": place / "data",
            "sources": [{"path": str(corpus), "license": "made up"}],
            "splits": {"gl": 0.98, "cl": 0.01, "eval": 0.01},
            "near_duplicate": _THRESHOLD,
        }
    )
    watch = _Watch(place)
    began = time.monotonic()
    prepare(data, 0, watch.progress)
    steps = watch.end()
    facts = {
        "cpu_seconds": sum(steps.values()),
        "wall_seconds": time.monotonic() - began,
        "steps": steps,
        "peak_bytes": watch.memory,
        "work_bytes": watch.disk,
        "corpus_bytes": corpus.stat().st_size,
    }
    sys.stdout.write(json.dumps(facts) + "\n")


class _Watch:
    """CPU seconds by step, and the peaks of memory and disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = self.disk = 0
        self._steps: dict[str, float] = defaultdict(float)
        self._step, self._cpu = "start", cpu_seconds()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def progress(self, step: str, done: int, total: int | None) -> None:
        """Charge the CPU time since the last change to the step before."""
        if step != self._step:
            now = cpu_seconds()
            self._steps[self._step] += now - self._cpu
            self._step, self._cpu = step, now

    def end(self) -> dict[str, float]:
        """Return the CPU seconds of each step."""
        self.progress("", 0, None)
        self._done.set()
        self._thread.join()
        return dict(self._steps)

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            self.memory = max(self.memory, sum(_resident(p) for p in _processes()))
            self.disk = max(self.disk, _bytes_below(self.folder))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all its children, ended ones included."""
    total = time.process_time()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total += ended.ru_utime + ended.ru_stime
    for process in _processes()[1:]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _bytes_below(folder: Path) -> int:
    """Return the disk space below a folder, without the corpus; files may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def judge(data: Path, made: Recombined, count: int, planted: list[Planted]) -> dict[str, float]:
    """Compare finished shards with what was planted.

    A pair is found if one of the two was dropped, or both are in one group. Recall is the share of
    planted pairs with an index of at least the threshold that are found; precision is the share of
    pairs of one group that are near duplicates of each other, or both of one original, which may
    have been dropped. Exact duplicates count in `exact`, the share that is dropped.
    """
    group_of = _groups(data)
    missing = count - len(group_of)
    exact = [pair for pair in planted if not pair.near]
    near = [p for p in planted if p.near][:: max(1, len(planted) // _JUDGED)]
    true = [p for p in near if _index(made, p.copy, p.original) >= _THRESHOLD]
    found = [p for p in true if _together(group_of, p)]
    together = _pairs(group_of)
    sources = {pair.copy: pair.original for pair in planted}
    right = [pair for pair in together if _is_right(made, sources, pair)]
    gone = sum(p.copy not in group_of or p.original not in group_of for p in exact)
    return {
        "planted": len(true),
        "recall": len(found) / max(1, len(true)),
        "precision": len(right) / max(1, len(together)),
        "exact": gone / max(1, len(exact)),
        "dropped": missing,
    }


def _groups(data: Path) -> dict[int, str]:
    splits = Manifest.load(data).splits
    return {int(r.id): sys.intern(r.group) for name in splits for r in read_split(data, name)}


def _together(group_of: dict[int, str], pair: Planted) -> bool:
    groups = group_of.get(pair.copy), group_of.get(pair.original)
    return None in groups or groups[0] == groups[1]


def _pairs(group_of: dict[int, str]) -> list[tuple[int, int]]:
    """Return each record of a group with two, paired with the other; at most `_JUDGED`."""
    members: dict[str, list[int]] = defaultdict(list)
    for number, group in group_of.items():
        members[group].append(number)
    pairs = [(own[0], own[1]) for own in members.values() if len(own) == 2]
    return pairs[:: max(1, len(pairs) // _JUDGED)]


def _is_right(made: Recombined, sources: dict[int, int], pair: tuple[int, int]) -> bool:
    """Return whether two are near duplicates, or both are of what one of them or both copy."""
    origins = {sources.get(number, number) for number in pair}
    return _index(made, *pair) >= _THRESHOLD or (
        len(origins) == 1 and all(_index(made, number, *origins) >= _THRESHOLD for number in pair)
    )


def _index(made: Recombined, one: int, other: int) -> float:
    return similarity(made.passage(one)[0], made.passage(other)[0])
