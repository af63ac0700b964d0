"""A checkpoint's files onto the disk, in a thread of each rank: whole, or not there at all.

No rank waits for another in a collective here. Each writes its files into `step-N.part`, flushes
them to the disk, and leaves `rank-K.json` with their sizes and hashes. Rank 0 waits for all of
those, writes the manifest and renames the folder: only then is there a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbr_ds import runs
from lbr_ds.system.atomic import fsync, write_json
from lbr_ds.system.locate import file_sha256

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Plan:
    """What one rank writes. `files` makes its files in the folder given and says which."""

    final: Path  # .../checkpoints/step-000500
    rank: int
    size: int
    files: Callable[[Path], list[Path]]
    facts: dict[str, Any]  # state.json
    keep: int
    keep_every: int | None
    keep_best: bool

    @property
    def part(self) -> Path:
        """The folder that becomes `final` when it is whole."""
        return self.final.with_suffix(".part")


class Writing(threading.Thread):
    """One rank's share of one checkpoint, under way from `start()` on.

    `failure` is the reason why it could not be written, once the thread has ended; `cancel` makes
    it end early. On rank 0 a thread that ended without failure means that the checkpoint stands.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.plan = plan
        self.failure = ""
        self.cancel = threading.Event()

    def run(self) -> None:
        """Write, flush, and on rank 0 publish. Never raises: it has nobody to tell."""
        try:
            self._write()
            if self.plan.rank == 0:
                self._publish()
        except Exception as error:
            self.failure = reason(error)

    def _write(self) -> None:
        plan, listed = self.plan, {}
        plan.part.mkdir(parents=True, exist_ok=True)
        for path in plan.files(plan.part):
            if self.cancel.is_set():
                return
            name = path.relative_to(plan.part).as_posix()
            listed[name] = seal(path)
        write_json(plan.part / f"rank-{plan.rank}.json", listed)

    def _publish(self) -> None:
        plan, files = self.plan, {}
        for rank in range(plan.size):
            left = plan.part / f"rank-{rank}.json"
            while not left.exists():
                if self.cancel.wait(_POLL_SECONDS):
                    return
            files.update(json.loads(left.read_text(encoding="utf-8")))
            left.unlink()
        write_json(plan.part / "state.json", plan.facts)
        files["state.json"] = seal(plan.part / "state.json")
        write_json(plan.part / runs.MANIFEST, files)
        for folder in (plan.part, *(p for p in plan.part.rglob("*") if p.is_dir())):
            fsync(folder)
        if plan.final.exists():
            aside = plan.final.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            plan.final.rename(aside)
            log.warning("%s was passed over; it is now %s", plan.final, aside.name)
        plan.part.rename(plan.final)
        fsync(plan.final.parent)
        prune(plan.final, plan.keep, plan.keep_every, plan.keep_best)


def prune(newest: Path, keep: int, keep_every: int | None, keep_best: bool) -> None:
    """Remove the checkpoints before `newest` but `keep` (with it) and every `keep_every`-th step's.

    keep_best: nor the best of them, by the evaluation that was saved with each. Those after
    `newest` were passed over as damaged: they do not count, and stay for their owner to look at, as
    all do that are not whole. One on its way out is renamed first, and no checkpoint.
    """
    found = runs.checkpoints(newest.parent.parent)
    found = found[: found.index(newest) + 1]
    best = runs.best_first(found)[:1] if keep_best else []
    for old in found[:-keep]:
        if old not in best and (keep_every is None or runs.step_of(old) % keep_every):
            going = old.with_suffix(".part")
            try:
                old.rename(going)
                shutil.rmtree(going)
            except OSError as error:  # the new checkpoint stands all the same
                log.warning("%s cannot be removed: %s", old, error.strerror)


def sweep(stage_folder: Path) -> None:
    """Remove what a killed save or resume left. Rank 0 calls it before any rank saves."""
    for suffix in (".part", ".universal"):
        for path in (stage_folder / "checkpoints").glob(f"step-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed %s, left by a process that was killed", path)


def reason(error: BaseException) -> str:
    """What the operating system said, if it is at the root of `error`; else what `error` says.

    torch.save closes its archive over an OSError and then complains of that archive.
    """
    root: BaseException | None = error
    while root is not None and not isinstance(root, OSError):
        root = root.__cause__ or root.__context__
    return (root and root.strerror) or str(error) or type(error).__name__


def save_tensors(state: Any, path: Path) -> None:
    """torch.save through a Python file, so that a full disk is an OSError that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(state, file)


def link_files(names: Iterable[str], source: Path, folder: Path) -> list[Path]:
    """Files of an earlier checkpoint once more, in `folder`; copied where links are not to be had.

    A checkpoint is whole without the others all the same: a file goes with its last name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / name for name in names]
    for path in made:
        try:
            os.link(source / path.name, path)
        except OSError:
            shutil.copyfile(source / path.name, path)
    return made


def seal(path: Path) -> dict[str, Any]:
    """Make a file durable; returns what the manifest says of it."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
