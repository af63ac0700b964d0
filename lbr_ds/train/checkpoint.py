"""Checkpoints: saved while training goes on, found again, and taken up only when they fit.

RUN/stageN/checkpoints/step-000500/
    files.json   every file's size and sha256; written last, so it vouches for a whole folder
    state.json   step, counters, evaluation, ranks, versions, the keys that decide the numbers, the
                 data's hash
    state/       the engine's shards (what learns, optimizer) and each rank's random states
    state/base/  under adapters (lora.rank): the frozen weights that they lie over
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

from lbr_ds.config import RunConfig
from lbr_ds.corpora.curate.leaks import TRAINED
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.instructions import Instructions
from lbr_ds.lineage import Dataset
from lbr_ds.model.files import in_files, save_files, save_index, share_of
from lbr_ds.model.rope import write_legacy_rope
from lbr_ds.runs import MANIFEST, fault, saved
from lbr_ds.shards import Manifest
from lbr_ds.system import environment
from lbr_ds.train import ancestry
from lbr_ds.train.engine import Engine
from lbr_ds.train.random_states import random_states, restore_random_states
from lbr_ds.train.snapshot import HostMemory
from lbr_ds.train.writer import Plan, Writing, link_files, save_tensors, sweep

log = logging.getLogger(__name__)
Counters = dict[str, Any]  # JSON-ready
_BASE = Path("state", "base")  # what lies frozen below adapters: the same at every step
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 10  # that a failing rank gives a save under way


class Saver:
    """Open for the length of a stage: `with Saver(...) as saver: saver.save(step, counters)`.

    Entered or left, all ranks call every method at the same steps. An error inside the `with`
    leaves without collectives, since another rank may be gone, but lets the writing end.
    """

    def __init__(self, run: RunConfig, stage: int, engine: Engine, world: World) -> None:
        self.run, self.stage, self.engine, self.world = run, stage, engine, world
        self.seconds = 0.0  # that training has stood still for saving
        self._memory = HostMemory() if run.every.save_async else None
        self._writing: Writing | None = None
        self._before: Path | None = None  # what this process saved last
        self._folder = run.run / f"stage{stage}"
        self._data = ancestry.data_of(self._folder)
        split = TRAINED[stage - 1]
        self._instructions = Manifest.load(run.data.folder).instructions.within(split)

    def __enter__(self) -> Saver:
        return self

    def save(self, step: int, counters: Counters, evaluation: Counters | None = None) -> None:
        """Save after `step` optimizer steps: copy the state, and write the copy meanwhile.

        `counters` are numbers of the whole run, equal on all ranks; `resume` gives them back.
        evaluation: held-out figures of this state, on rank 0; `stage2.from: best` goes by them.
        Waits for the save before. Raises CheckpointError when that or (not save_async) this fails.
        """
        self.finish()
        with self._timed():
            self._writing = Writing(self._plan(step, counters, evaluation or {}))
            self._writing.start()
        if not self.run.every.save_async:
            self.finish()

    def poll(self) -> None:
        """At a step's end: agree on how the save under way is getting on.

        Raises CheckpointError on all ranks when one could not write; its `.part` is removed.
        """
        if self._writing is not None:
            with self._timed():
                self._agree(self._writing)

    def finish(self) -> None:
        """Wait until the save under way, if any, stands. Raises as `poll` does."""
        with self._timed():
            while self._writing is not None and not self._agree(self._writing):
                time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def _agree(self, writing: Writing) -> bool:
        """Whether the writing has ended, on all ranks."""
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
            f"{part}: rank {source} cannot write the checkpoint: {why}; make room or give another "
            "run folder with run=..., and start again: the checkpoints before it stand"
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
                made += ancestry.describe(self._folder, step, facts["samples"], part / "model")
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
            keep_best=self.stage == 1 and run.stage2.start_from == "best",
        )

    def _facts(self, step: int, counters: Counters, evaluation: Counters) -> dict[str, Any]:
        recipe = self.run.decisive(self.stage)
        return {
            "step": step,
            "stage": self.stage,
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "dtype": str(self.engine.dtype),
            "samples": step * self.run.stage(self.stage).samples_per_step,
            "counters": counters,
            "evaluation": evaluation,
            "data": _data(self._data, self.stage),
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
    """Config, tokenizer and instructions beside the weights. Returns the files made."""
    save_index(weights, folder)
    for path in (run.run / "backbone").iterdir():
        own = path.name in (*ancestry.FILES, MANIFEST) or ".index." in path.name
        if path.is_file() and path.suffix != ".safetensors" and not own:
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_legacy_rope(folder)  # a backbone that was prepared before has the new keys alone
    if used.any:
        used.save(folder)
    found = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in found if path.suffix != ".safetensors")


def find(run: RunConfig, stage: int, world: World, *, force: bool = False) -> Path | None:
    """The checkpoint to go on from: the newest that is whole; None when there never was one.

    All ranks call it, before anything in the run folder is changed. Raises CheckpointError when
    none is whole, or that one was made by a recipe or from data that give other numbers; force
    accepts those.
    """
    folder = run.run / f"stage{stage}"
    if world.first:
        sweep(folder)
    world.barrier()
    found = newest_whole(folder, world)
    if found is not None:
        _check_fit(found, run, stage, world, force=force)
    return found


def resume(found: Path | None, engine: Engine, world: World) -> Counters:
    """Load what `find` found, if anything. All ranks call it. The counters that were saved with it.

    Raises CheckpointError when it cannot be loaded, as after a change of ZeRO stage or precision.
    """
    if found is None:
        return {}
    facts = _facts_of(found)
    for key, now in (("zero_stage", engine.stage), ("dtype", str(engine.dtype))):
        if facts[key] != now:
            raise CheckpointError(
                f"{found} was saved with {key} {facts[key]} and engine.ds_config now gives {now}; "
                "use the ds_config of before"
            )
    if facts["world_size"] == world.size:
        engine.load_state(found / "state")
    else:
        log.info("%s: laid out for %d ranks, was %d", found, world.size, facts["world_size"])
        engine.load_reshaped(found / "state", found.with_suffix(".universal"))
    # Of more ranks than there were, some start from the same numbers: nothing in a step is drawn
    # from where they stand (dropout is seeded by the step).
    mine = found / "state" / f"random-{world.rank % facts['world_size']}.pt"
    restore_random_states(torch.load(mine, weights_only=True))
    counters: Counters = facts["counters"]
    return counters


def newest_whole(stage_folder: Path, world: World) -> Path | None:
    """The newest checkpoint that is whole; see `first_whole`."""
    return first_whole(world.share(saved(stage_folder)[::-1]), world)


def first_whole(found: list[Path], world: World) -> Path | None:
    """The first checkpoint whose files are as they were saved; the ranks share the reading.

    Damaged ones are named in the log and passed over. Raises CheckpointError when all are.
    """
    for path in found:
        mine = fault(path, part=world.rank, parts=world.size)
        (finder,) = world.max(world.rank + 1 if mine else 0)
        if not finder:
            return Path(path)
        why = world.share(mine, source=int(finder) - 1)
        log.warning("%s is damaged and skipped: %s", path, why)
    if found:
        raise CheckpointError(
            f"{found[0].parent}: all {len(found)} checkpoints are damaged ({found[-1].name}: "
            f"{why}); restore one, or remove them to start from step 0"
        )
    return None


def _check_fit(found: Path, run: RunConfig, stage: int, world: World, *, force: bool) -> None:
    """Raises CheckpointError unless the checkpoint is of this recipe and data."""
    facts, reasons = _facts_of(found), []
    if world.share(world.first and ancestry.same_backbone(run, found)):
        for key in ("backbone", "revision"):  # the same content may be at another place now
            facts["recipe"]["model"][key] = getattr(run.model, key)
    if changed := ", ".join(environment.differences(facts["recipe"], run.decisive(stage))):
        reasons.append(f"was made by another recipe ({changed})")
    if facts["data"] != (data := _data(Manifest.load(run.data.folder), stage)):
        reasons.append(
            f"was trained on data {facts['data'][:12]} and {run.data.folder} now holds {data[:12]}"
        )
    if reasons and not force:
        raise CheckpointError(
            f"{found} {' and '.join(reasons)}; undo the change, give a new run folder with "
            "run=..., or go on all the same with --force"
        )
    for reason in reasons:
        log.warning("--force: %s %s; going on all the same", found, reason)
    if other := ", ".join(environment.differences(facts["versions"], environment.versions())):
        log.warning("%s was made with other versions (%s); numbers may differ", found, other)


def _facts_of(found: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((found / "state.json").read_text(encoding="utf-8"))
    return facts


def _data(data: Manifest | Dataset, stage: int) -> str:
    """The fingerprint of what the stage reads: stage 1 does not read mined negatives."""
    return data.prepared if stage == 1 else data.fingerprint
