"""Work on chunks by all cores, results in the order of the chunks: same bytes, any machine."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lbr_ds.errors import EnvironmentProblem

Job = TypeVar("Job")
Result = TypeVar("Result")
_ALONE = 8  # chunks done here before other processes are worth their start


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[Job], Result], jobs: Iterator[Job]) -> Iterator[Result]:
    """`map(work, jobs)`, by as many processes as there are cores once there is enough to do.

    Holds at most two jobs a core. `work` must be a module's function. Raises EnvironmentProblem
    when a process is killed.
    """
    for _ in range(_ALONE):
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
    with ProcessPoolExecutor(number, mp_context=context) as pool:
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
                "a helper process was killed, by lack of memory perhaps; run again"
            ) from None
        finally:
            for future in waiting:
                future.cancel()
