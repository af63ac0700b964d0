"""Map a function over jobs on all cores, with the results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import TypeVar

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import children

Job = TypeVar("Job")
Result = TypeVar("Result")
JOBS_ALONE = 8  # jobs done by this process before starting others is worthwhile


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(
    work: Callable[[Job], Result], jobs: Iterator[Job], alone: int = JOBS_ALONE
) -> Iterator[Result]:
    """Yield `work(job)` for each job in order, using a process per core if there are many jobs.

    Holds at most two jobs per core. The processes are those of `kept_processes`, or started for
    this call.

    Args:
        work: A function at the top level of a module, so that other processes can import it.
        jobs: Values that can be pickled.
        alone: Jobs that this process does before others are started for the rest.

    Raises:
        EnvironmentProblem: A process was killed.
    """
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
    number = cores()
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= 2 * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise EnvironmentProblem(
            "a helper process died: out of memory, or the script that calls prepare lacks "
            "`if __name__ == '__main__':`"
        ) from None
    finally:
        for future in waiting:
            future.cancel()


class _Kept:
    """A pool of processes that is started when it is first used."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    @property
    def started(self) -> bool:
        return self._pool is not None

    def pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Spawned, not forked: this process may have threads (progress bars, torch).
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                cores(), mp_context=context, initializer=_serve, initargs=(os.getpid(),)
            )
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


_kept: _Kept | None = None


@contextmanager
def kept_processes() -> Iterator[None]:
    """Let all calls of `map_in_order` inside use the same processes, which start in a second."""
    global _kept
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
