"""Write metrics to metrics.jsonl, the trackers, the log and a progress bar. Rank 0 only.

Evaluations are written to evaluations.jsonl, and to the trackers (`trackers.py`) as
`evaluation/...`. A line is complete when `log` returns, so a killed run keeps all steps but the one
that it was in.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lbr_ds.distributed import World
from lbr_ds.runs import EVALUATIONS
from lbr_ds.system.atomic import write_text
from lbr_ds.system.failures import writing
from lbr_ds.training.trackers import Rows, Trackers

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
_LINE_SECONDS = 10  # between two progress lines, without a terminal

_TITLES = {
    "recall_at_10": "R@10",
    "ndcg_at_10": "N@10",
    "separation_ratio": "separation",
    "loss": "loss",
    "loss_without_bottleneck": "without the bottleneck",
}


def memory_gib() -> float:
    """Return the peak memory of this process: of its GPU if it has one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_memory(world: World) -> float:
    """Return the bytes that a rank may still allocate: of its GPU, or its share of the host's."""
    if world.device.type == "cuda":
        return float(torch.cuda.mem_get_info(world.device)[0])
    return psutil.virtual_memory().available / world.size


class Meter:
    """Context manager of a stage: `with Meter(...) as meter: meter.log(step, ...)`."""

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        stop: int,
        every: int,
        world: World,
        trackers: Trackers,
    ) -> None:
        self.folder, self.start, self.stop, self.every = folder, start, stop, every
        self.world, self.trackers = world, trackers
        self._began = self._last_line = time.perf_counter()
        self._file: IO[str] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Meter:
        if self.world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / METRICS).open("a", encoding="utf-8")
            self.trackers.open(self.start)
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=console)
        self._bar.start()
        self._task = self._bar.add_task(
            self.folder.name, total=self.stop, completed=self.start, note=""
        )

    def log(self, step: int, values: Mapping[str, float | list[float]]) -> None:
        """Write the metrics of optimizer step `step` (from 1) if that is due.

        Args:
            step: Number of the step, from 1.
            values: The metrics; a list has one number per rank.

        Raises:
            EnvironmentProblem: The disk is full.
        """
        if self._file is None:
            return
        if step % self.every == 0 or step == self.stop:
            with writing(self._file.name):
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
            single = {name: v for name, v in values.items() if not isinstance(v, list)}
            self.trackers.scalars(METRICS, single, step)
        note = f"loss {values['loss']:.4f}"
        if "accuracy" in values:
            note += f"  accuracy {values['accuracy']:.2f}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif time.perf_counter() - self._last_line > _LINE_SECONDS or step == self.stop:
            self._last_line = time.perf_counter()
            left = (self._last_line - self._began) / (step - self.start) * (self.stop - step)
            log.info("step %d/%d  %s  %.0f s left", step, self.stop, note, left)

    def evaluation(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write the figures of an evaluation after `step`, if there are any.

        Raises:
            EnvironmentProblem: The disk is full.
        """
        if self._file is None or not figures:
            return
        path = self.folder / EVALUATIONS
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        shown = {f"evaluation/{name}": v for name, v in figures.items() if v is not None}
        self.trackers.scalars(EVALUATIONS, shown, step)
        known = {
            title: value for k, title in _TITLES.items() if (value := figures.get(k)) is not None
        }
        line = "  ".join(f"{title} {value:.3f}" for title, value in known.items())
        log.info("step %d, held out: %s (%.1f s)", step, line, figures["seconds"])

    def examples(self, step: int, columns: Sequence[str], rows: Rows) -> None:
        """Send held-out queries with the passages that the model found to the trackers."""
        if self._file is not None:
            self.trackers.table(EVALUATIONS, "retrieval", columns, rows, step)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
            self.trackers.close()


def forget_after(path: Path, step: int) -> int:
    """Drop the lines about steps after `step`, and incomplete lines, from a JSON Lines file.

    Returns:
        The last step that the file was about; 0: none.
    """
    if not path.exists():
        return 0
    kept, last = [], 0
    # Not splitlines(), which also splits at U+2028 and U+0085: names of samples may contain them.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            about = json.loads(line)["step"]
        except ValueError:
            continue
        last = max(last, about)
        if about <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
    return last
