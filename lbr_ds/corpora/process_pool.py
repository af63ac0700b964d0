"""Map a function over jobs on all cores, with the results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import children

Job = TypeVar("Job")
Result = TypeVar("Result")
_JOBS_ALONE = 8  # jobs done by this process before starting others is worthwhile


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(work: Callable[[Job], Result], jobs: Iterator[Job]) -> Iterator[Result]:
    """Yield `work(job)` for each job in order, using a process per core if there are many jobs.

    Holds at most two jobs per core.

    Args:
        work: A function at the top level of a module, so that other processes can import it.
        jobs: Values that can be pickled.

    Raises:
        EnvironmentProblem: A process was killed.
    """
    for _ in range(_JOBS_ALONE):
        job = next(jobs, None)
        if job is None:
            return
        yield work(job)
    number = cores()
    if number == 1:
        yield from map(work, jobs)
        return
    # Spawned, not forked: this process may have threads (progress bars, torch).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        number, mp_context=context, initializer=_serve, initargs=(os.getpid(),)
    ) as pool:
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


def _serve(parent: int) -> None:
    """Start a worker: it leaves Ctrl-C to its parent, and ends if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # CPython's pool keeps both ends of its queue open in each worker, which therefore does not
    # notice that the parent has ended.
    children.follow(parent)
