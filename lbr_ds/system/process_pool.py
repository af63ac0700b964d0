"""Map a function over jobs on all cores, with the results in the order of the jobs.

An engine may do the jobs of a phase on several machines instead, see `spread_over`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import children
from lbr_ds.system.threads import results_in_order

Job = TypeVar("Job")
Result = TypeVar("Result")
DIED = (
    "a helper process died: out of memory, or the script that calls prepare lacks "
    "`if __name__ == '__main__':`"
)
JOBS_ALONE = 8  # jobs done by this process before starting others is worthwhile


class Engine(Protocol):
    """Does the jobs of a phase on several machines.

    Attributes:
        folder: Where it stores phases; all machines see it.
    """

    folder: Path

    def map(self, phase: str, work: Callable[[Any], Any], jobs: Iterator[Any]) -> Iterator[Any]:
        """Yield `work(job)` for each job in order."""

    def forget(self, phase: str) -> None:
        """Remove what is stored of a phase, whose results are no longer needed."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(
    work: Callable[[Job], Result],
    jobs: Iterator[Job],
    alone: int = JOBS_ALONE,
    phase: str = "",
) -> Iterator[Result]:
    """Yield `work(job)` for each job in order, using a process per core if there are many jobs.

    Holds at most two jobs per core. The processes are those of `kept_processes`, or started for
    this call.

    Args:
        work: A function at the top level of a module, so that other processes can import it.
        jobs: Values that can be pickled.
        alone: Jobs that this process does before others are started for the rest.
        phase: A name that no other call has. With it the engine of `spread_over`, if any, does the
            jobs: they must be small, depend on files that all machines see, and be the same
            whenever the work is resumed.

    Raises:
        EnvironmentProblem: A process was killed.
    """
    if phase and _engine is not None:
        yield from _engine.map(phase, work, jobs)
        return
    if _kept is None or not _kept.started:
        for _ in range(alone):
            job = next(jobs, None)
            if job is None:
                return
            yield work(job)
    if cores() == 1:
        yield from map(work, jobs)
    elif _kept is not None:
        yield from _mapped(_kept.pool(), work, jobs)
    else:
        with closing(_Kept()) as own:
            yield from _mapped(own.pool(), work, jobs)


def _mapped(
    pool: ProcessPoolExecutor, work: Callable[[Job], Result], jobs: Iterator[Job]
) -> Iterator[Result]:
    number = 2 * cores()
    try:
        yield from results_in_order(pool, work, jobs, lambda done: number)
    except BrokenProcessPool:
        raise EnvironmentProblem(DIED) from None


def processes(number: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end with this one."""
    # Spawned, not forked: this process may have threads (progress bars, torch).
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        number, mp_context=context, initializer=_serve, initargs=(os.getpid(),)
    )


class _Kept:
    """A pool of processes that is started when it is first used."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    @property
    def started(self) -> bool:
        return self._pool is not None

    def pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = processes(cores())
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


_kept: _Kept | None = None
_engine: Engine | None = None


@contextmanager
def spread_over(engine: Engine | None) -> Iterator[None]:
    """Let an engine do the jobs of all calls of `map_in_order` inside that name a phase."""
    global _engine
    outer, _engine = _engine, engine
    try:
        yield
    finally:
        _engine = outer


def forget_phase(phase: str) -> None:
    """Free the space of a phase whose results are stored elsewhere, if there is an engine."""
    if _engine is not None:
        _engine.forget(phase)


def is_spread() -> bool:
    """Return whether an engine does the jobs of phases."""
    return _engine is not None


@contextmanager
def kept_processes(phases: Path) -> Iterator[None]:
    """Let all calls of `map_in_order` inside use the same processes, which start in a second.

    Args:
        phases: A folder for the phases of an engine, if there is one.
    """
    global _kept
    if _engine is not None:
        _engine.folder = phases
    outer, _kept = _kept, _Kept()
    try:
        with closing(_kept):
            yield
    finally:
        _kept = outer


def _serve(parent: int) -> None:
    """Start a worker: it leaves Ctrl-C to its parent, and ends if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # CPython's pool keeps both ends of its queue open in each worker, which therefore does not
    # notice that the parent has ended.
    children.follow(parent)
