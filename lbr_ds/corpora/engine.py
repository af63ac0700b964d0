"""Prepare a corpus on several nodes: datatrove's executor runs the jobs of `map_in_order`.

A phase is a folder that all nodes see: `jobs/TASK` and `results/TASK` (pickles, one after another)
beside datatrove's `completions/TASK`, `logs/` and `stats/`. Task t has the jobs t, t + tasks, ...;
node n runs the tasks n, n + nodes, ... A task is complete when its marker exists, so after any kill
only tasks without a marker are repeated. A pickle can run code, so a phase's folder is closed to
other users, and a folder that is not is refused.

datatrove's own LocalPipelineExecutor is not used: its pool waits for ever for a task whose process
was killed. Our executor derives from the same class, and repeats such a task.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from datatrove.executor.base import PipelineExecutor

from lbr_ds.corpora.nodes import Nodes, Spread
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system.atomic import atomic_file
from lbr_ds.system.process_pool import DIED, cores, processes, spread_over

log = logging.getLogger(__name__)
_ATTEMPTS = 3  # of a task whose process was killed


@contextlib.contextmanager
def leading(folder: Path, spread: Spread) -> Iterator[None]:
    """Let `prepare` of `folder` inside the block, as node 0, share its work with the others."""
    nodes = Nodes(folder, 0, spread.nodes)
    with (
        nodes.lead(),
        contextlib.closing(Workers(nodes)) as workers,
        spread_over(Engine(nodes, workers, spread.tasks)),
    ):
        yield


def assist(folder: Path, spread: Spread) -> None:
    """Do another node's share of the work of preparing `folder`, until node 0 ends.

    Raises:
        EnvironmentProblem: Node 0 has failed or ended, or did not start.
    """
    nodes = Nodes(folder, spread.node, spread.nodes)
    with contextlib.closing(Workers(nodes)) as workers:
        nodes.assist(workers.run)


class Engine:
    """Does the jobs of each phase on all nodes; node 0 uses it for `spread_over`.

    Args:
        nodes: The nodes.
        workers: The processes of this one.
        tasks: Into how many tasks the jobs of a phase are divided.
    """

    def __init__(self, nodes: Nodes, workers: Workers, tasks: int) -> None:
        self.folder = Path()  # `kept_processes` sets it
        self._nodes, self._workers, self._tasks = nodes, workers, tasks

    def _place(self, phase: str) -> Path:
        return self.folder / f"{phase.replace(' ', '-')}-{self._tasks}"

    def forget(self, phase: str) -> None:
        """Remove what is stored of a phase."""
        shutil.rmtree(self._place(phase), ignore_errors=True)

    def map(self, phase: str, work: Callable[[Any], Any], jobs: Iterator[Any]) -> Iterator[Any]:
        """Yield `work(job)` for each job in order, after all of them are done."""
        folder = self._place(phase)
        # Jobs are the same whenever the work is resumed, so those of a killed run are used.
        if not (folder / "jobs").is_dir():
            self._store(folder, work, jobs)
        self._nodes.start(folder, self._tasks)
        self._workers.run(folder, self._tasks)
        everything = _Phase(folder, self._tasks, range(self._tasks))
        self._nodes.finish(lambda: not everything.get_incomplete_ranks())
        with contextlib.ExitStack() as stack:
            files = _open_all(stack, _checked(folder) / "results", "rb", self._tasks)
            parts = cycle(map(_loaded, files))
            for part in parts:
                try:
                    yield next(part)
                except StopIteration:
                    return

    def _store(self, folder: Path, work: Callable[[Any], Any], jobs: Iterator[Any]) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = folder / "jobs.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        with contextlib.ExitStack() as stack:
            files = _open_all(stack, part, "wb", self._tasks)
            for number, job in enumerate(jobs):
                pickle.dump((work, job), files[number % self._tasks])
        part.rename(folder / "jobs")


class Workers:
    """The processes of one node, one per core, each started when it is needed."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._free: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()
        self._number = cores()
        for _ in range(self._number):
            self._free.put(None)

    def run(self, folder: Path, tasks: int) -> None:
        """Do this node's share of the tasks of a phase.

        Raises:
            EnvironmentProblem: The process of a task was killed again and again.
        """
        phase = _Phase(folder, tasks, range(self._nodes.node, tasks, self._nodes.nodes))
        failed = False

        def do(task: int) -> None:
            nonlocal failed
            if not failed:
                try:
                    self._do(phase, task)
                except BaseException:
                    failed = True
                    raise

        with ThreadPoolExecutor(self._number) as threads:
            for _ in threads.map(do, phase.get_incomplete_ranks()):
                pass

    def _do(self, phase: _Phase, task: int) -> None:
        """Do a task in a process of its own; the other processes continue if it is killed."""
        process = self._free.get()
        try:
            for attempt in range(_ATTEMPTS):
                process = process or processes(1)
                try:
                    process.submit(phase.do, task).result()
                    return
                except BrokenProcessPool:
                    process = None
                    name = f"task {task} of {phase.folder.name}"
                    log.warning("%s was killed (attempt %d)", name, attempt + 1)
            raise EnvironmentProblem(f"{name} was killed {_ATTEMPTS} times; {DIED}")
        finally:
            self._free.put(process)

    def close(self) -> None:
        """End the processes."""
        for _ in range(self._number):
            if (process := self._free.get()) is not None:
                process.shutdown()


class _Phase(PipelineExecutor):
    """One phase for datatrove: tasks with markers, logs and statistics."""

    def __init__(self, folder: Path, tasks: int, own: Iterable[int]) -> None:
        super().__init__([_Jobs(folder)], logging_dir=str(folder))
        self.folder, self._tasks, self._own = folder, tasks, own

    @property
    def world_size(self) -> int:
        return self._tasks

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: Any = None) -> list[int]:
        """Return this node's tasks that are to be done."""
        missing: list[int] = super().get_incomplete_ranks(ranks or self._own, skip_completed)
        return missing

    def get_distributed_env(self, node_rank: int = -1) -> dict[str, str]:
        """Return what datatrove puts into the environment of a task."""
        unknown = dict.fromkeys(("cpus_per_task", "mem_per_cpu", "gpus_on_node"), "-1")
        known = {"node_ips": "localhost", "executor": "LOCAL"}
        return {f"datatrove_{name}": value for name, value in (known | unknown).items()}

    def run(self) -> None:
        """Do the tasks one after another."""
        for task in self.get_incomplete_ranks():
            self.do(task)

    def do(self, task: int) -> None:
        """Do a task in this process. Its log is in `logs/`, not on the terminal."""
        with contextlib.redirect_stderr(io.StringIO()):
            self._run_for_rank(task, local_rank=1)


@dataclass(frozen=True)
class _Jobs:
    """The step of a phase: the jobs of one task."""

    folder: Path

    def __call__(self, data: Any, task: int, tasks: int) -> None:
        name = f"{task:05d}"
        with (
            (_checked(self.folder) / "jobs" / name).open("rb") as jobs,
            atomic_file(self.folder / "results" / name) as results,
        ):
            for work, job in _loaded(jobs):
                pickle.dump(work(job), results)


def _checked(folder: Path) -> Path:
    """Return the folder of a phase, if no other user can have written there."""
    facts = folder.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise EnvironmentProblem(
            f"{folder}: another user may write here, and what the nodes exchange can run code; "
            "remove this folder and start prepare again"
        )
    return folder


def _loaded(file: BinaryIO) -> Iterator[Any]:
    """Yield the pickles of a file."""
    while True:
        try:
            value = pickle.load(file)
        except EOFError:
            return
        yield value


def _open_all(stack: contextlib.ExitStack, folder: Path, mode: str, tasks: int) -> list[Any]:
    """Open the file of each task."""
    return [stack.enter_context((folder / f"{task:05d}").open(mode)) for task in range(tasks)]
