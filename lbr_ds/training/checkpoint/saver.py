"""Save checkpoints in the background while training continues.

RUN/stageN/checkpoints/step-000500/
    files.json   size and sha256 of every file; written last, so a folder with it is complete
    state.json   step, counters, evaluation, number of ranks, versions, the recipe's keys that
                 change results, and the fingerprint of the data
    state/       the engine's shards (trainable weights, optimizer) and each rank's random states
    state/base/  with adapters (lora.rank): the frozen weights under them
    model/       the weights as a Hugging Face folder, for stage 2, export and evaluation; adapters
                 are merged
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lbr_ds import lineage
from lbr_ds.config import STAGES, RunConfig
from lbr_ds.errors import CheckpointError
from lbr_ds.instructions import Instructions
from lbr_ds.model.files import in_files, save_files, save_index, share_of
from lbr_ds.model.rope import write_legacy_rope
from lbr_ds.runs import MANIFEST
from lbr_ds.shards import Manifest
from lbr_ds.system import environment
from lbr_ds.training.checkpoint import provenance
from lbr_ds.training.checkpoint.random_states import random_states
from lbr_ds.training.checkpoint.snapshot import HostMemory
from lbr_ds.training.checkpoint.writing import Plan, Writing, link_files, save_tensors
from lbr_ds.training.deepspeed.engine import Engine

log = logging.getLogger(__name__)
Counters = dict[str, Any]  # JSON-ready
_BASE = Path("state", "base")  # frozen weights under adapters: the same at every step
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 10  # that a failing rank waits for a save in progress


class Saver:
    """Context manager of a stage: `with Saver(...) as saver: saver.save(step, counters)`.

    All ranks call every method at the same steps. On an error inside the `with` it issues no
    collectives, since another rank may be gone, but waits for a save in progress.

    Attributes:
        seconds: For which training has waited for saves.
    """

    def __init__(self, run: RunConfig, stage: int, engine: Engine) -> None:
        self.run, self.stage, self.engine, self.world = run, stage, engine, engine.world
        self.seconds = 0.0
        self._memory = HostMemory() if run.every.save_async else None
        self._writing: Writing | None = None
        self._before: Path | None = None  # what this process saved last
        self._folder = run.run / f"stage{stage}"

    def __enter__(self) -> Saver:
        self._data = provenance.data_of(self._folder)
        instructions = Manifest.load(self.run.data.folder).instructions
        self._instructions = instructions.within(STAGES[self.stage].split)
        return self

    def save(self, step: int, counters: Counters, evaluation: Counters | None = None) -> None:
        """Start to save: copy the state now, and write the copy in the background.

        Waits until the previous save has ended.

        Args:
            step: Optimizer steps done.
            counters: State of the run, equal on all ranks; `load_checkpoint` returns it.
            evaluation: Held-out figures, on rank 0; `runs.best_first` compares them.

        Raises:
            CheckpointError: The previous save failed, or, without `every.save_async`, this one.
        """
        self.finish()
        with self._timed():
            self._writing = Writing(self._plan(step, counters, evaluation or {}))
            self._writing.start()
        if not self.run.every.save_async:
            self.finish()

    def poll(self) -> None:
        """Check at the end of a step whether the save in progress has ended or failed.

        Raises:
            CheckpointError: On all ranks, when one could not write; its `.part` is removed.
        """
        if self._writing is not None:
            with self._timed():
                self._agree(self._writing)

    def finish(self) -> None:
        """Wait until the save in progress, if any, has ended. Raises as `poll` does."""
        with self._timed():
            while self._writing is not None and not self._agree(self._writing):
                time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def _agree(self, writing: Writing) -> bool:
        """Return whether the writing has ended on all ranks."""
        busy = writing.is_alive()
        mine = 0 if busy or not writing.failure else self.world.rank + 1
        failed, still_busy = self.world.max(mine, busy)
        if failed:
            self._give_up(writing, source=int(failed) - 1)
        if not still_busy:
            self._writing, self._before = None, writing.plan.final
            log.info("saved %s", writing.plan.final)
        return not still_busy

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif self._writing is not None:
            self._writing.join(_GRACE_SECONDS)

    def _give_up(self, writing: Writing, source: int) -> None:
        writing.cancel.set()
        writing.join()
        self._writing = None
        part, why = writing.plan.part, self.world.share(writing.failure, source)
        self.world.barrier()
        if self.world.first:
            shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"{part}: rank {source} cannot write the checkpoint: {why}; free disk space or set "
            "another run folder with run=..., and start again: earlier checkpoints are kept"
        )

    def _plan(self, step: int, counters: Counters, evaluation: Counters) -> Plan:
        run, world, engine = self.run, self.world, self.engine
        states = engine.snapshot(self._memory)
        states[f"state/random-{world.rank}.pt"] = random_states()
        files = in_files(engine.sizes())
        # Each rank keeps and writes some of the files, so that none holds a whole large model.
        own = share_of(files, world.rank, world.size)
        mine = {name for names in own.values() for name in names}
        before = self._before and self._before / _BASE
        weights, base = dict(engine.weights(mine)), {} if before else dict(engine.base(mine))

        def write(part: Path) -> list[Path]:
            for name, state in states.items():
                save_tensors(state, part / name)
            made = [part / name for name in states]
            for folder, held in ((part / "model", weights), (part / _BASE, base)):
                if held:
                    save_files(own, held.__getitem__, folder)
                    made += [folder / file for file in own]
            if before and engine.adapted:
                made += link_files(own, before, part / _BASE)
            if world.first:
                made += describe_model(run, engine.dtype, files, part / "model", self._instructions)
                made += provenance.describe(self._folder, step, facts["samples"], part / "model")
            return made

        facts = self._facts(step, counters, evaluation)
        return Plan(
            self._folder / "checkpoints" / f"step-{step:06d}",
            world.rank,
            world.size,
            write,
            facts,
            run.every.keep,
            run.every.keep_every,
            keep_best=run.keeps_best(self.stage),
        )

    def _facts(self, step: int, counters: Counters, evaluation: Counters) -> dict[str, Any]:
        recipe = self.run.result_settings(self.stage)
        return {
            "step": step,
            "stage": self.stage,
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "dtype": str(self.engine.dtype),
            "samples": step * self.run.stage(self.stage).samples_per_step,
            "counters": counters,
            "evaluation": evaluation,
            "data": lineage.fingerprint_of(self._data, self.stage),
            "config": hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
            "recipe": recipe,
            "versions": environment.versions(),
        }


def describe_model(
    run: RunConfig,
    dtype: torch.dtype,
    weights: Mapping[str, list[str]],
    folder: Path,
    used: Instructions,
) -> list[Path]:
    """Write config, tokenizer and instructions beside the weights; return the files made."""
    save_index(weights, folder)
    for path in (run.run / "backbone").iterdir():
        own = path.name in (*provenance.FILES, MANIFEST) or ".index." in path.name
        if path.is_file() and path.suffix != ".safetensors" and not own:
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_legacy_rope(folder)  # a backbone prepared by an earlier version has the new keys only
    if used.any:
        used.save(folder)
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in files if path.suffix != ".safetensors")
