"""Write a checkpoint's files in a thread of each rank, so that it is complete or does not exist.

No collectives are used here. Each rank writes its files into `step-N.part`, flushes them to disk,
and writes `rank-K.json` with their sizes and hashes. Rank 0 waits for all of those, writes the
manifest and renames the folder: only then does the checkpoint exist.
"""

from __future__ import annotations

import hashlib
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
from lbr_ds.system.io_progress import flush_part
from lbr_ds.training.watch import WRITER

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.02
_PART = 32 << 20  # bytes that are flushed at once


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Attributes:
        final: The checkpoint's folder, .../checkpoints/step-000500.
        rank: This rank.
        size: Number of ranks.
        files: `files(folder)` writes the rank's files and returns their paths.
        facts: Content of state.json.
        keep: How many of the newest checkpoints are kept.
        keep_every: Checkpoints whose step is a multiple of it are kept too.
        keep_best: Whether the best one is kept too.
    """

    final: Path
    rank: int
    size: int
    files: Callable[[Path], list[Path]]
    facts: dict[str, Any]
    keep: int
    keep_every: int | None
    keep_best: bool

    @property
    def part(self) -> Path:
        """The folder that becomes `final` when it is complete."""
        return self.final.with_suffix(".part")


class Writing(threading.Thread):
    """Thread that writes one rank's share of one checkpoint.

    On rank 0, a thread that ended without failure means that the checkpoint is complete.

    Attributes:
        failure: Why the share could not be written, once the thread has ended; or "".
        cancel: Set it to end the thread early.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(name=WRITER, daemon=True)
        self.plan = plan
        self.failure = ""
        self.cancel = threading.Event()

    def run(self) -> None:
        """Write, flush, and on rank 0 publish; errors are kept in `failure`."""
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
            log.warning("%s was damaged and skipped; renamed to %s", plan.final, aside.name)
        plan.part.rename(plan.final)
        fsync(plan.final.parent)
        prune(plan.final, plan.keep, plan.keep_every, plan.keep_best)


def prune(newest: Path, keep: int, keep_every: int | None, keep_best: bool) -> None:
    """Remove old checkpoints.

    Checkpoints after `newest` were skipped as damaged: they are not counted and not removed, and
    neither is any other incomplete one. A checkpoint is renamed before it is removed, so a partly
    removed one is never taken for a checkpoint.

    Args:
        newest: The checkpoint just written.
        keep: How many of the newest ones are kept, with it.
        keep_every: Those whose step is a multiple of it are kept too; None: no others.
        keep_best: Whether the best one, by the evaluation saved with each, is kept too.
    """
    saved = runs.checkpoints(newest.parent.parent, state=True)
    saved = saved[: saved.index(newest) + 1]
    best = runs.best_first(saved)[:1] if keep_best else []
    for old in saved[:-keep]:
        if old not in best and (keep_every is None or runs.step_of(old) % keep_every):
            renamed = old.with_suffix(".part")
            try:
                old.rename(renamed)
                shutil.rmtree(renamed)
            except OSError as error:  # the new checkpoint is complete nevertheless
                log.warning("%s cannot be removed: %s", old, error.strerror)


def sweep(stage_folder: Path) -> None:
    """Remove what a killed process left behind. Rank 0 calls it before any rank saves."""
    for suffix in (".part", ".universal"):
        for path in (stage_folder / "checkpoints").glob(f"step-*{suffix}"):
            shutil.rmtree(path, ignore_errors=True)
            log.info("removed %s, left by a process that was killed", path)


def reason(error: BaseException) -> str:
    """Return the operating system's message if an OSError is the cause of `error`, else its own.

    torch.save closes its archive after an OSError and then raises another error about the archive.
    """
    root: BaseException | None = error
    while root is not None and not isinstance(root, OSError):
        root = root.__cause__ or root.__context__
    return (root and root.strerror) or str(error) or type(error).__name__


def save_tensors(state: Any, path: Path) -> None:
    """Call torch.save on a Python file, so that a full disk raises an OSError that says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(state, file)


def link_files(names: Iterable[str], source: Path, folder: Path) -> list[Path]:
    """Hard-link files of an earlier checkpoint into `folder`, or copy them where links fail.

    Each checkpoint is complete on its own: a linked file exists until its last name is removed.
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
    """Flush a file to disk; return its entry in the manifest.

    It is read for its hash and flushed in parts, so that the watch sees the progress: flushing a
    large file at once may take longer than `engine.timeout_minutes`.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(_PART):
            flush_part(file.fileno(), size, len(part))
            digest.update(part)
            size += len(part)
    fsync(path)
    return {"bytes": size, "sha256": digest.hexdigest()}
