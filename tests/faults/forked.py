"""Start rank processes in about a second, by forking a server that has imported everything.

    with Ranks(recipe, 2, folder, ["every.save=1"]) as ranks:
        ranks.until(SAVING)
        ranks.kill()
    print(ranks.said())

A rank runs `lbr-ds train` like the command line, with the same errors and exit codes. It writes its
phase into a shared byte, so that the phase in which a signal arrived is known afterwards.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from lbr_ds.system import children
from tests.ranks import free_port

STARTING, LEARNING, ACCUMULATING, UPDATING, SAVING = range(5)
PHASES = ("starting", "mid-step", "mid-accumulation", "mid-update", "mid-save")
_PRELOAD = [
    "tests.faults.forked",
    "lbr_ds.training.loop",
    "lbr_ds.cli",
    "webdataset",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
]
# CPU ranks wherever this runs: a GPU's sums may differ from one run to the next.
_SERVER = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_POLL = 0.0005
Hook = Callable[[int], None]  # called in each rank with its number, before the training


class Ranks:
    """One start of a training: `world` processes, their output and their phases."""

    def __init__(
        self,
        recipe: Path,
        world: int,
        folder: Path,
        overrides: Sequence[str] = (),
        *,
        stage: int = 1,
        hook: Hook | None = None,
    ) -> None:
        """folder: for output and notes; hook: done in every rank first (must be picklable)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "notes").write_bytes(bytes(2 * world))
        for old in folder.glob("rank-*.out"):
            old.unlink()
        self.folder, self.began = folder, time.monotonic()
        arguments = ["train", str(recipe), *overrides, "--stage", str(stage)]
        port = str(free_port())
        self.processes: list[ForkServerProcess] = []
        for rank in range(world):
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            process = _server().Process(target=_rank, args=(arguments, env, folder, hook))
            with _environment():
                process.start()
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def phases(self) -> list[int]:
        """Return the phase of each rank."""
        return list((self.folder / "notes").read_bytes()[: len(self.processes)])

    def steps(self) -> int:
        """Return the steps that the furthest rank has begun since this start, at most 255."""
        return max((self.folder / "notes").read_bytes()[len(self.processes) :])

    def start(self) -> int | None:
        """Return the step that the ranks resume from; None until they have logged it."""
        found = re.search(r"steps (\d+) to \d+", self.said())
        return int(found[1]) if found else None

    def until(self, ready: Callable[[], bool], limit: float = 60) -> bool:
        """Wait for ready(). Return False if a rank ended or `limit` seconds passed before."""
        end = time.monotonic() + limit
        sentinels = [process.sentinel for process in self.processes]
        while not ready():
            if time.monotonic() > end or wait(sentinels, _POLL):
                return ready()
        return True

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, number)

    def kill(self, rank: int | None = None, patience: float = 0.0) -> None:
        """kill -9 of one rank or of all; the survivors have `patience` seconds to end as well."""
        self.send(signal.SIGKILL, rank)
        self.wait(patience)

    def wait(self, limit: float = 120) -> list[int]:
        """The exit codes once all have ended; those that have not by then are killed."""
        end = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def said(self) -> str:
        """Return the output of all ranks so far, rank after rank."""
        outputs = [self.folder / f"rank-{rank}.out" for rank in range(len(self.processes))]
        return "".join(path.read_text(errors="replace") for path in outputs if path.exists())


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The server is started with the first process, and with the environment of that moment."""
    before = dict(os.environ)
    os.environ.update(_SERVER)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _rank(arguments: list[str], env: dict[str, str], folder: Path, hook: Hook | None) -> None:
    """The life of a rank process: `python -m lbr_ds` but for what is imported already."""
    # The server, which ends with the process that has asked it for ranks.
    children.follow(os.getppid(), children.GRACE)
    os.environ.update(env)
    rank = int(env["RANK"])
    output = os.open(folder / f"rank-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _take_notes(folder, rank, int(env["WORLD_SIZE"]))
    if hook is not None:
        hook(rank)
    # Loader processes start as they do elsewhere, and not by this server.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["lbr-ds", *arguments]
    runpy.run_module("lbr_ds", run_name="__main__")


def _take_notes(folder: Path, rank: int, world: int) -> None:
    """Wrap what a step consists of: what it is at into a shared byte, its samples into a file."""
    from lbr_ds.training import loop
    from lbr_ds.training.checkpoint.saver import Saver
    from lbr_ds.training.deepspeed.engine import Engine
    from lbr_ds.training.stages import STAGES

    with (folder / "notes").open("r+b") as file:
        note = mmap.mmap(file.fileno(), 0)

    def wrap(owner: object, name: str, before: int, after: Callable[..., int]) -> None:
        inner = getattr(owner, name)

        def outer(*args: object, **more: object) -> object:
            note[rank] = before
            if name == "take_step":
                note[world + rank] = min(255, note[world + rank] + 1)
            try:
                return inner(*args, **more)
            finally:
                note[rank] = after(**more)

        setattr(owner, name, outer)

    wrap(loop, "take_step", LEARNING, lambda **_: LEARNING)
    wrap(Engine, "backward", LEARNING, lambda last, **_: LEARNING if last else ACCUMULATING)
    wrap(Engine, "step", UPDATING, lambda **_: LEARNING)
    wrap(Saver, "save", SAVING, lambda **_: LEARNING)
    samples = os.open(folder / f"samples-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, stage in STAGES.items():

        def collate(run: Any, tokenizer: Any, step: Any, inner: Any = stage.collate) -> Any:
            ids = {sample.lane: sample.record.id for sample in step.samples}
            os.write(samples, f"{json.dumps([step.index, ids])}\n".encode())
            return inner(run, tokenizer, step)

        STAGES[number] = replace(stage, collate=collate)
