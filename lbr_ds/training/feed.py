"""Read, encode and pack this rank's samples in loader processes, ahead of the training step."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lbr_ds.batching import TextTokenizer
from lbr_ds.config import STAGES, RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import DataError, LbrError
from lbr_ds.lineage import fingerprint_of
from lbr_ds.shards import Manifest, Step, steps
from lbr_ds.system import children
from lbr_ds.training.stages import Stage
from lbr_ds.training.work import Work, collate_generative

log = logging.getLogger(__name__)
_AHEAD = 4  # steps that each loader process prepares in advance


@dataclass
class _Feed(IterableDataset):
    """Steps start..stop of one rank; loader process w of W makes steps w, w + W, and so on."""

    run: RunConfig
    stage: Stage
    tokenizer: TextTokenizer
    rank: int
    world: int
    start: int
    stop: int
    fingerprint: str

    def __iter__(self) -> Iterator[Work | LbrError]:
        """Yield our errors as values: a DataLoader would wrap them in a traceback's text."""
        try:
            yield from self._work()
        except LbrError as error:
            yield self._changed() or error

    def _work(self) -> Iterator[Work]:
        """Yield the work of each step; stage 2 may replay a batch of stage 1 beside its own."""
        run = self.run
        parts = [self._steps(number) for number in run.parts(self.stage.number)]
        if error := self._changed():  # between the checks at the start and the reading of shards
            raise error
        for step, *replayed in zip(*parts, strict=True):
            if (step.skipped or any(s.skipped for s in replayed)) and (error := self._changed()):
                raise error
            work = self.stage.collate(run, self.tokenizer, step)
            for other in replayed:
                budget = run.stage2.micro_tokens
                replay = collate_generative(run, self.tokenizer, other, budget)
                work = replace(work, replay=replay)
            yield work

    def _steps(self, number: int) -> Iterable[Step]:
        """Return this process's steps of the split that stage `number` trains on."""
        info = get_worker_info()
        return steps(
            self.run.data.folder,
            STAGES[number].split,
            seed=self.run.seed,
            samples_per_step=self.run.stage(number).samples_per_step,
            rank=self.rank,
            world=self.world,
            start=self.start,
            stop=self.stop,
            worker=info.id if info else 0,
            workers=info.num_workers if info else 1,
            on_error=self.run.data.on_error,
            cache_gib=self.run.data.cache_gib,
            mixing=self.run.mixing(number),
        )

    def _changed(self) -> DataError | None:
        """Return the error for records that cannot be read because the data has been replaced."""
        if not self.fingerprint:
            return None
        try:
            now = Manifest.load(self.run.data.folder)
        except LbrError:
            return None
        current = fingerprint_of(now, self.stage.number)
        if current == self.fingerprint:
            return None
        return DataError(
            f"{now.place} was prepared again during the training (data {self.fingerprint} -> "
            f"{current}); a checkpoint of this run was trained on the earlier data: restore that "
            "data, or give a new run folder with run=...; without a checkpoint, start again"
        )


def open_feed(
    run: RunConfig,
    stage: Stage,
    tokenizer: TextTokenizer,
    world: World,
    *,
    start: int,
    stop: int,
    fingerprint: str = "",
) -> Iterator[Work]:
    """Return the rank's work for steps start..stop, in order.

    The loader processes are forked at once, and each keeps a copy of the memory of this process.

    Args:
        run: The recipe.
        stage: The stage.
        tokenizer: Turns texts into token ids.
        world: This rank's place.
        start: First step, from 0.
        stop: Number of steps of the stage.
        fingerprint: Of the data that the stage expects (`lineage.fingerprint_of`); empty: any.

    Raises:
        DataError: Records cannot be read or encoded, also in a loader process; or, immediately, an
            instruction in the manifest leaves no room for text.
    """
    instructions = Manifest.load(run.data.folder).instructions
    used = instructions.within(stage.split)
    for number in run.parts(stage.number):
        tokenizer.check(instructions.within(STAGES[number].split).stated())
    if used.any and not run.model.pool_instruction and run.model.pooling == "last":
        log.info("model.pool_instruction=false has no effect with model.pooling=last")
    feed = _Feed(run, stage, tokenizer, world.rank, world.size, start, stop, fingerprint)
    workers = min(run.data.workers, max(0, stop - start))
    pinned = world.device.type == "cuda"
    loader: Iterable[Work | LbrError] = feed
    if workers:
        loader = DataLoader(
            feed,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            pin_memory=pinned,
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
            # Else it would draw from the rank's own generator, at every start and resume.
            generator=torch.Generator().manual_seed(run.seed),
        )
    return _raise_errors(iter(loader), pin=pinned and not workers)


def _raise_errors(works: Iterator[Work | LbrError], *, pin: bool) -> Iterator[Work]:
    for work in works:
        if isinstance(work, LbrError):
            raise work
        yield work.pin_memory() if pin else work


def _begin_worker(rank: int, worker: int) -> None:
    """Set up a loader process: it ends with its rank (a process id), and ignores signals.

    The handlers inherited from the rank would only set a flag in this process. A first SIGTERM is
    ignored: `scancel` sends it to every process of a job, and the rank still needs batches to end
    its step and save. DataLoader sends another one to a process that does not end by itself.
    """
    children.follow(rank)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ignore_once)


def _ignore_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
