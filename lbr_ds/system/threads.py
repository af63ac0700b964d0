"""Map a function over jobs ahead of who reads the results, in the order of the jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 8  # requests at a time
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def map_ahead(
    work: Callable[[_Job], _Result], jobs: Iterable[_Job], threads: int = READERS
) -> Iterator[_Result]:
    """Yield `work(job)` in the order of the jobs; threads, which wait for a server, work ahead.

    They begin with one job and take one more each time, so that little is done in vain if only the
    first results are used.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield from results_in_order(pool, work, jobs, lambda done: min(1 + done, threads))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def results_in_order(
    pool: Executor,
    work: Callable[[_Job], _Result],
    jobs: Iterable[_Job],
    most: Callable[[int], int],
) -> Iterator[_Result]:
    """Yield `work(job)`, done by a pool, in the order of the jobs.

    Args:
        pool: Does the work.
        work: The function.
        jobs: Its arguments.
        most: Returns how many jobs may be in the pool when so many results were yielded.
    """
    waiting: deque[Future[_Result]] = deque()
    done = 0
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= most(done):
                yield waiting.popleft().result()
                done += 1
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
