"""Work on chunks by all cores, results in the order of the chunks: same bytes, any machine."""

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
_ALONE = 8  # chunks done here before other processes are worth their start


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def map_in_order(work: Callable[[Job], Result], jobs: Iterator[Job]) -> Iterator[Result]:
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
    """Begin a helper: Ctrl-C is its parent's to handle, and it ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # CPython's pool keeps both ends of its queue in each worker: none sees that the parent is gone.
    children.follow(parent)
