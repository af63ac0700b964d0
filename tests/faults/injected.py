"""Inject faults into a small run, one at a time: is each reported, with the right exit code?

A fault counts as named if every required word (file, rank, step, cause) is in the output or logs of
the ranks, the exit code is right, and the saved checkpoints are still whole.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lbr_ds.config import RunConfig
from lbr_ds.errors import CheckpointError, LostRank, TrainingError
from lbr_ds.runs import MANIFEST, checkpoints, saved
from tests.faults.forked import Hook, Ranks
from tests.faults.kills import WORLD

log = logging.getLogger(__name__)
_STUCK_MINUTES = 0.3  # engine.timeout_minutes where a rank hangs; a start must fit into it
_SPIKE_STEP = 70  # the guard judges from its 65th step on
_TMPFS = "1536k"  # room for the backbone and one or two checkpoints
What = Literal["gradient", "loss", "spike", "hang", "slow"]
Act = Callable[[Ranks], object]


@dataclass(frozen=True)
class Outcome:
    """Whether a fault was named. said: the output of the ranks, for faults that were not."""

    fault: str
    named: bool
    said: str


@dataclass(frozen=True)
class Ended:
    """A run that has ended, in whatever way."""

    codes: list[int]
    text: str  # terminal and logs of all ranks
    stage: Path

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [
            json.loads(line)
            for line in (self.stage / "metrics.jsonl").read_text().split("\n")
            if line
        ]


class Scene:
    """Runs small trainings with faults, each in a folder of its own."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        self.folder = folder
        self.recipe = Path(run.model.backbone).parent / "recipe.yaml"

    def train(
        self,
        name: str,
        steps: int,
        *overrides: str,
        hook: Hook | None = None,
        act: Act | None = None,
        run: Path | None = None,
    ) -> Ended:
        """Train stage 1 for `steps` steps, while act(ranks) does something to them."""
        place = run or self.folder / name / "run"
        fixed = [f"run={place}", f"stage1.num_steps={steps}"]
        notes = self.folder / name
        with Ranks(self.recipe, WORLD, notes, [*fixed, *overrides], hook=hook) as ranks:
            if act is not None:
                act(ranks)
            codes = ranks.wait()
        logs = sorted((place / "stage1" / "log").glob("rank-*.log"))
        text = ranks.said() + "".join(path.read_text(errors="replace") for path in logs)
        return Ended(codes, text, place / "stage1")

    def outcome(self, fault: str, ended: Ended, right: bool, *words: str) -> Outcome:
        """Judge a run. right: exit codes and other conditions; words: required in the output."""
        missing = [word for word in words if word not in ended.text]
        named = right and not missing
        log.info("fault: %s: %s", fault, "named" if named else f"NOT NAMED, lacks {missing}")
        return Outcome(fault, named, f"{ended.codes}: {ended.text[-1500:]}")


def guard_faults(scene: Scene) -> list[Outcome]:
    """A gradient or loss that is not finite, a spike; a rank that dies, hangs, stops or lags."""
    poisons: list[tuple[str, int, tuple[str, ...], What, str, str]] = [
        ("non-finite gradient", 3, (), "gradient", "step 3: loss", "gradient norm n"),
        ("non-finite loss", 4, (), "loss", "step 4: loss nan", "update skipped"),
        (
            "loss spike",
            _SPIKE_STEP,
            ("guard.spike_sigmas=6",),
            "spike",
            f"step {_SPIKE_STEP}: loss",
            "sigmas above the mean",
        ),
    ]
    found = []
    for name, step, overrides, what, *words in poisons:
        hook = functools.partial(disturb, victim=1, first=step, last=step, what=what)
        ended = scene.train(name, step + 2, "every.save=1000", *overrides, hook=hook)
        right = ended.codes == [0, 0] and ended.metrics()[-1]["skipped_updates"] == 1
        found.append(scene.outcome(name, ended, right, *words, "Its samples: "))
    hook = functools.partial(disturb, victim=1, first=3, last=99, what="gradient")
    ended = scene.train("non-finite for good", 20, hook=hook)
    right = set(ended.codes) == {TrainingError.exit_code}
    found.append(
        scene.outcome(
            "non-finite for good", ended, right, "step 6:", "guard.max_skipped=3", "skipped.jsonl"
        )
    )
    for name, rank, number in (
        ("dead rank 1", 1, signal.SIGKILL),
        ("dead rank 0", 0, signal.SIGKILL),
        ("stopped rank 1", 1, signal.SIGSTOP),
    ):
        found.append(_lost(scene, name, rank, number))
    hook = functools.partial(disturb, victim=1, first=4, last=4, what="hang")
    ended = scene.train("hung rank 1", 500, f"engine.timeout_minutes={_STUCK_MINUTES}", hook=hook)
    right = set(ended.codes) == {LostRank.exit_code}
    found.append(scene.outcome("hung rank 1", ended, right, "rank 1 is furthest behind", "step 4"))
    hook = functools.partial(disturb, victim=1, first=1, last=99, what="slow")
    ended = scene.train("straggler", 20, hook=hook)
    last = ended.metrics()[-1]
    right = ended.codes == [0, 0] and last["slowest_rank"] == 1 and last["straggler"] < 0.7
    found.append(scene.outcome("straggler", ended, right))
    return found


def _lost(scene: Scene, name: str, rank: int, number: int) -> Outcome:
    """Send one rank a signal that it cannot catch; the other rank must report it."""

    def act(ranks: Ranks) -> None:
        ranks.until(lambda: ranks.steps() >= 3)
        ranks.send(number, rank)
        other = ranks.processes[1 - rank]
        other.join(120)
        ranks.send(signal.SIGKILL, rank)

    ended = scene.train(name, 10_000, f"engine.timeout_minutes={_STUCK_MINUTES}", act=act)
    right = ended.codes[1 - rank] == LostRank.exit_code
    return scene.outcome(name, ended, right, f"rank {rank} is gone", "last seen in step")


def disturb(rank: int, *, victim: int, first: int, last: int, what: What) -> None:
    """In rank `victim`: do something to the optimizer steps first..last (from 1) of this start."""
    from lbr_ds.training import loop
    from lbr_ds.training.deepspeed.engine import Engine

    if rank != victim:
        return
    step = 0
    take_step, backward = loop.take_step, Engine.backward

    def taken(*args: Any, **more: Any) -> Any:
        nonlocal step
        step += 1
        return take_step(*args, **more)

    def forwarded(engine: Engine) -> Any:
        return functools.partial(forward, engine.engine)

    def forward(module: Any, batch: Any) -> Any:
        # Inside a step, where a rank's own work is timed.
        if first <= step <= last and what in ("hang", "slow"):
            time.sleep(3600 if what == "hang" else 0.3)
        factor = {"loss": float("nan"), "spike": 1000.0}.get(what, 1.0)
        result = module(batch)
        return result * factor if first <= step <= last else result

    def backed(engine: Engine, loss: Any, **more: Any) -> None:
        here = what == "gradient" and first <= step <= last
        backward(engine, loss * float("nan") if here else loss, **more)

    loop.take_step, Engine.backward = taken, backed  # type: ignore
    Engine.forward = property(forwarded)  # type: ignore


def storage_faults(scene: Scene) -> list[Outcome]:
    """A disk that is full, read-only or slow while saving; a checkpoint damaged afterwards."""
    found = [_full(scene), _read_only(scene), _slow(scene)]
    for name, damage, word in (
        ("checkpoint: flipped bit", _flip, "changed since it was saved"),
        ("checkpoint: truncated", _cut, "were saved"),
        ("checkpoint: no manifest", _unlist, f"{MANIFEST}: missing"),
    ):
        place = scene.folder / name.replace(": ", "-") / "run"
        scene.train(place.parent.name, 4, "every.save=2", run=place)
        newest = saved(place / "stage1")[-1]
        damage(newest)
        ended = scene.train(place.parent.name, 4, "every.save=100", run=place)
        right = ended.codes == [0, 0] and "steps 2 to 4" in ended.text
        words = (f"{newest.name} is damaged and skipped", word)
        found.append(scene.outcome(name, ended, right, *words))
    return found


def _stands(ended: Ended) -> bool:
    """The save failed on all ranks, and the checkpoints before it are whole."""
    failed = set(ended.codes) == {CheckpointError.exit_code}
    return (
        failed
        and bool(checkpoints(ended.stage, state=True))
        and not list(ended.stage.rglob("*.part"))
    )


def _full(scene: Scene) -> Outcome:
    """Save to a full file system, or where none can be mounted, with writes that fail so."""
    place = scene.folder / "full" / "disk"
    place.mkdir(parents=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={_TMPFS}", "tmpfs", str(place))
    hook = None if mounted else functools.partial(fail_writes, after=2)
    try:
        ended = scene.train(
            "full", 200, "every.save=2", "every.keep=100", run=place / "run", hook=hook
        )
        return scene.outcome(
            "disk full",
            ended,
            _stands(ended),
            "cannot write the checkpoint",
            "No space left on device",
            str(place),
        )
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def _read_only(scene: Scene) -> Outcome:
    folder = scene.folder / "read-only" / "run" / "stage1" / "checkpoints"

    def act(ranks: Ranks) -> None:
        ranks.until(lambda: (folder / "step-000002").exists())
        if _mount("--bind", str(folder), str(folder)):
            _mount("-o", "remount,ro,bind", str(folder))
        else:
            folder.chmod(0o555)

    try:
        ended = scene.train("read-only", 500, "every.save=2", act=act)
        reason = "Read-only file system" if os.geteuid() == 0 else "Permission denied"
        whole = set(ended.codes) == {CheckpointError.exit_code} and checkpoints(
            ended.stage, state=True
        )
        return scene.outcome(
            "read-only folder",
            ended,
            bool(whole),
            "cannot write the checkpoint",
            reason,
            str(folder),
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
        folder.chmod(0o755)


def _slow(scene: Scene) -> Outcome:
    """Slow down flushing: the run ends well, and the metrics contain the waiting time."""
    hook = functools.partial(slow_flushes, seconds=0.2)
    ended = scene.train("slow", 6, "every.save=2", hook=hook)
    stalls = [line["save_seconds"] for line in ended.metrics()]
    right = (
        ended.codes == [0, 0] and stalls[-1] > 1 and len(checkpoints(ended.stage, state=True)) == 2
    )
    return scene.outcome("slow file system", ended, right)


def slow_flushes(rank: int, *, seconds: float) -> None:
    """Every fsync of this process takes that much longer."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(seconds)
        fsync(handle)

    os.fsync = slow  # type: ignore[assignment]


def fail_writes(rank: int, *, after: int) -> None:
    """In rank 1: every checkpoint but the first `after` fails as on a full disk."""
    from lbr_ds.training.checkpoint import saver

    seal, writes = saver.save_tensors, 0

    def full(state: Any, path: Path) -> None:
        nonlocal writes
        writes += "random" in path.name
        if rank == 1 and writes > after:
            raise OSError(28, os.strerror(28))
        seal(state, path)

    saver.save_tensors = full


def _mount(*arguments: str) -> bool:
    done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
    return done.returncode == 0


def _flip(checkpoint: Path) -> None:
    path = max(checkpoint.rglob("*.pt"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(checkpoint: Path) -> None:
    path = checkpoint / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def _unlist(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
