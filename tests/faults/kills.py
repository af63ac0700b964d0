"""kill -9 and restart: does the run resume as if nothing had happened?

Every start must resume from the newest checkpoint that was whole when its predecessor died, and the
end of the run must equal, bit for bit, the end of an undisturbed one.
"""

from __future__ import annotations

import functools
import logging
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lbr_ds.config import RunConfig
from lbr_ds.runs import checkpoints, step_of
from tests.faults.compare import differing_bits, steps_not_once, wrong_samples
from tests.faults.forked import ACCUMULATING, LEARNING, PHASES, SAVING, Ranks

log = logging.getLogger(__name__)
WORLD = 2
_SAVE = 3  # steps from one checkpoint to the next where kills come at any time
_PATIENCE = 1.0  # seconds, at most, that the survivors of a killed rank run
_ENTRIES = 18  # files and folders of a small checkpoint of two ranks
_LIMIT = 600  # seconds for the last, undisturbed part


@dataclass
class Campaign:
    """The results of killing a run again and again."""

    kills: int = 0
    lost_steps: int = 0  # behind the newest whole checkpoint at a start; not once in metrics.jsonl
    differing_bits: int = 0
    wrong_samples: int = 0
    unloadable: int = 0  # starts that did not load a whole checkpoint, or failed
    where: Counter[str] = field(default_factory=Counter)  # the phase in which ranks were killed
    trouble: list[str] = field(default_factory=list)  # output of ranks that failed

    def __add__(self, other: Campaign) -> Campaign:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Campaign(*(a + b for a, b in pairs))

    def failed(self, ranks: Ranks) -> None:
        """Count a start that failed by itself."""
        codes = ranks.wait(1)
        self.unloadable += 1
        self.trouble.append(f"exit codes {codes}: {ranks.said()[-2000:]}")
        log.warning("a start failed: %s", self.trouble[-1])


class Victim:
    """A stage of a small run that is restarted again and again, and an undisturbed one."""

    def __init__(self, run: RunConfig, folder: Path, stage: int, steps: int, seed: int = 0) -> None:
        """run: a `small_run`; folder: a new one, for both runs; steps: length of the stage."""
        self.recipe = Path(run.model.backbone).parent / "recipe.yaml"
        self.folder, self.number, self.last = folder, stage, steps
        self.stage = folder / "run" / f"stage{stage}"
        self.draw = random.Random(seed)

    def start(self, *overrides: str, name: str = "run", world: int = WORLD) -> Ranks:
        """Start the ranks of the disturbed run, or of another one by its `name`."""
        fixed = [f"run={self.folder / name}", f"stage{self.number}.num_steps={self.last}"]
        return Ranks(
            self.recipe,
            world,
            self.folder / f"notes-{name}",
            [*fixed, *overrides],
            stage=self.number,
        )

    def newest(self) -> int:
        """The step of the newest whole checkpoint on disk; 0 without one."""
        found = checkpoints(self.stage, state=True)
        return step_of(found[-1]) if found else 0

    def unfinished(self) -> list[Path]:
        """Return the checkpoints being written, after a start has removed leftovers.

        An old checkpoint that is being removed has the same suffix and is left out.
        """
        newest = self.newest()
        found = (self.stage / "checkpoints").glob("*.part")
        return [path for path in found if int(path.stem.removeprefix("step-")) > newest]

    def written(self) -> int:
        """How many files and folders of an unfinished checkpoint there are."""
        return max((1 + len(list(path.rglob("*"))) for path in self.unfinished()), default=0)

    def begun(self, ranks: Ranks, expected: int, found: Campaign) -> bool:
        """Wait until the ranks log where they resume; count lost steps, or a failure."""
        if not ranks.until(lambda: ranks.start() is not None):
            found.failed(ranks)
            return False
        found.lost_steps += abs(expected - (ranks.start() or 0))
        return True

    def finish(self, found: Campaign) -> Campaign:
        """Run to the end undisturbed, run another one from the start, and compare them."""
        for name in ("run", "alone"):
            expected = self.newest() if name == "run" else 0
            with self.start(f"every.save={self.last}", name=name) as ranks:
                if not self.begun(ranks, expected, found):
                    return found
                if any(ranks.wait(_LIMIT)):
                    found.failed(ranks)
                    return found
        alone = self.folder / "alone" / self.stage.name
        found.lost_steps += steps_not_once(self.stage, self.last)
        found.differing_bits += differing_bits(self.stage, alone)
        found.wrong_samples += wrong_samples(self.folder / "notes-run", self.folder / "notes-alone")
        return found


def kill_at_any_time(victim: Victim, kills: int) -> Campaign:
    """`kills` times kill -9 of one rank or of all; then to the end.

    In turns: at any time after the start, between two micro-batches, anywhere in a step, in a save.
    """
    found = Campaign()
    started = 2.0  # seconds until the ranks log where they resume, as far as known
    for number in range(kills):
        aim = (None, ACCUMULATING, LEARNING, SAVING)[number % 4]
        rank = victim.draw.choice((None, 0, 1))
        expected = victim.newest()
        with victim.start(f"every.save={_SAVE}", f"data.workers={number // 4 % 2}") as ranks:
            if aim is None:
                time.sleep(victim.draw.uniform(0, 1.5 * started))
            else:
                if not victim.begun(ranks, expected, found):
                    break
                started = time.monotonic() - ranks.began
                if not _reach(aim, ranks, rank or 0, victim):
                    found.failed(ranks)
                    break
            ranks.send(signal.SIGKILL, rank)
            saving = ranks.steps() and victim.unfinished()
            phase = SAVING if saving else ranks.phases()[rank or 0]
            found.where[PHASES[phase]] += 1
            ranks.kill(rank, victim.draw.uniform(0, _PATIENCE))
        found.kills += 1
        log.info(
            "stage %d: kill %d of %d, %s, newest checkpoint %d",
            victim.number,
            number + 1,
            kills,
            PHASES[phase],
            victim.newest(),
        )
    return victim.finish(found)


def _reach(aim: int, ranks: Ranks, rank: int, victim: Victim) -> bool:
    """Return at a random instant of a phase, some steps after the start; whether it was reached."""
    steps = victim.draw.randint(1, 2 * _SAVE)

    def there() -> bool:
        if ranks.steps() < steps:
            return False
        return bool(victim.unfinished()) if aim == SAVING else ranks.phases()[rank] == aim

    reached = ranks.until(there)
    time.sleep(victim.draw.uniform(0, 0.02))
    return reached


def kill_in_saves(victim: Victim, kills: int) -> Campaign:
    """`kills` times kill -9 between a checkpoint's first byte and its rename; then to the end.

    The instants are spread over what a save writes, file by file. Where the rename came before
    the kill, the run resumes from it like from any other, and the kill is not counted.
    """
    found = Campaign()
    while found.kills < kills:
        rank = victim.draw.choice((None, 0, 1))
        with victim.start("every.save=1") as ranks:
            if not victim.begun(ranks, expected := victim.newest(), found):
                break
            whole = expected + victim.draw.randint(0, 2)  # the saves before it are let through
            entries = victim.draw.randint(1, _ENTRIES)
            if not ranks.until(functools.partial(_in_save, victim, whole, entries)):
                found.failed(ranks)
                break
            time.sleep(victim.draw.uniform(0, 0.005))
            before = victim.newest()
            ranks.send(signal.SIGKILL, rank)
            inside = bool(victim.unfinished())
            ranks.kill(rank, victim.draw.uniform(0, _PATIENCE))
        if inside and victim.newest() == before:
            found.kills += 1
            found.where["of all ranks" if rank is None else "of one rank"] += 1
            log.info("kill %d of %d in a save, newest checkpoint %d", found.kills, kills, before)
    return victim.finish(found)


def _in_save(victim: Victim, whole: int, entries: int) -> bool:
    """Whether the save after step `whole` has made so many files, or is over already."""
    newest = victim.newest()
    return newest > whole or (newest == whole and victim.written() >= entries)
