"""Report the progress of long work: a bar on a terminal, a log line now and then elsewhere.

A function that may take long accepts a callback and calls it as often as it likes::

    def rank(pool: Pool, progress: Progress = no_progress) -> None:
        for done, query in enumerate(pool.queries, 1):
            ...
            progress("rank", done, len(pool.queries))

Whoever starts the work decides where the progress is shown::

    with show_progress() as progress:
        rank(pool, progress)

In a file, as under SLURM, the lines look like this, the first one after `FIRST_LINE` seconds and
the others at least `LINE_INTERVAL` seconds apart, however many parts report::

    near duplicates: 14 of 32 (44 %), 0.62/s, 0:00:29 left
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

log = logging.getLogger(__name__)
FIRST_LINE, LINE_INTERVAL = 5.0, 20.0  # seconds

Progress = Callable[[str, int, int | None], None]
"""`progress(part, done, total)`: `total` is None where it is not known beforehand."""

_shown: Progress | None = None  # what the outermost `show_progress` of this process uses


def no_progress(part: str, done: int, total: int | None) -> None:
    """Ignore the report: the default of functions that accept a `Progress`."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Yield the callback that shows progress on stderr; nested uses share the outermost one."""
    global _shown
    if _shown is not None:
        yield _shown
        return
    try:
        if sys.stderr.isatty():
            with _bars() as _shown:
                yield _shown
        else:
            _shown = ProgressLines()
            yield _shown
    finally:
        _shown = None


@contextmanager
def _bars() -> Iterator[Progress]:
    """Yield a callback that draws one bar for each part and removes them at the end."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def update(part: str, done: int, total: int | None) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=total)
            bars.update(tasks[part], completed=done, total=total)

        yield update


class ProgressLines:
    """A `Progress` that logs a line now and then.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_line = clock() + FIRST_LINE
        self._starts: dict[str, tuple[float, int]] = {}  # of each part: time and `done`

    def __call__(self, part: str, done: int, total: int | None) -> None:
        """Log the state of `part` if a line is due."""
        now = self._clock()
        start, done_at_start = self._starts.setdefault(part, (now, done))
        if now < self._next_line:
            return
        self._next_line = now + LINE_INTERVAL
        rate = (done - done_at_start) / (now - start) if now > start else 0.0
        log.info("%s: %s", part, _state(done, total, rate))


def _state(done: int, total: int | None, rate: float) -> str:
    words = [f"{done:,}"]
    if total:
        words[0] += f" of {total:,} ({done / total:.0%})".replace("%", " %")
    if rate > 0:
        words.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if total is not None:
            words.append(f"{timedelta(seconds=round((total - done) / rate))} left")
    return ", ".join(words)
