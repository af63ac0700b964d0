"""Requested stops: a signal, another number of ranks; and how long training waits for a save."""

from __future__ import annotations

import json
import logging
import random
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from lbr_ds.bench.measure import interleaved
from lbr_ds.config import RunConfig
from lbr_ds.errors import TrainingError
from tests.faults.compare import largest_relative_error, wrong_samples
from tests.faults.forked import Ranks
from tests.faults.kills import WORLD, Victim

log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_LONG = 10_000  # steps of a run that does not reach its end


def signal_to_exit(run: RunConfig, folder: Path, times: int) -> list[float]:
    """Seconds from a signal to the end of all ranks, beyond the longest step and one save.

    One of SIGUSR1, SIGUSR2 and SIGTERM, to one rank or to all, at a random instant, while saves
    are written in the background. Raises TrainingError unless all ranks save and end with 85.
    """
    from lbr_ds.errors import SAVED_AND_STOPPED

    draw, save, found = random.Random(0), _seconds_of_a_save(run, folder), []
    victim = Victim(run, folder, 1, _LONG)
    for number in range(times):
        with victim.start("every.save=5") as ranks:
            steps = draw.randint(2, 8)
            ranks.until(lambda wanted=steps: ranks.steps() >= wanted)  # type: ignore[misc]
            time.sleep(draw.uniform(0, 0.1))
            began = time.monotonic()
            ranks.send(_SIGNALS[number % len(_SIGNALS)], draw.choice((None, 0, 1)))
            codes = ranks.wait()
            seconds = time.monotonic() - began
        lines = _metrics(victim.stage)
        if codes != [SAVED_AND_STOPPED] * WORLD or victim.newest() != lines[-1]["step"]:
            raise TrainingError(
                f"signal {number}: exit codes {codes}, newest checkpoint {victim.newest()}, last "
                f"step {lines[-1]['step']}: {ranks.said()[-500:]}"
            )
        found.append(seconds - max(line["step_seconds"] for line in lines) - save)
        log.info("signal %d of %d: %.2f s beyond a step and a save", number + 1, times, found[-1])
    return found


def stall_per_save(run: RunConfig, folder: Path, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds that training waits for a save, (asynchronous, synchronous) per round."""
    starts = iter(range(1000))

    def stall(asynchronous: bool) -> float:
        every, saves = 4, 2
        name = f"stall-{next(starts)}"
        victim = Victim(run, folder, 1, every * saves + 1)
        overrides = (f"every.save={every}", f"every.save_async={asynchronous}")
        with victim.start(*overrides, name=name) as ranks:
            _ended_well(ranks)
        stage = folder / name / "stage1"
        seconds = _metrics(stage)[-1]["save_seconds"] / saves
        log.info("save, %s: %.3f s of waiting", "async" if asynchronous else "sync", seconds)
        return float(seconds)

    return interleaved(lambda: stall(True), lambda: stall(False), rounds)


def change_worlds(
    run: RunConfig, folder: Path, worlds: tuple[int, ...], steps: int
) -> tuple[float, int]:
    """Run a stage on worlds[0] ranks, stop it, resume it on worlds[1], and so on to its end.

    Returns:
        (largest relative error of the weights against an undisturbed run on worlds[0] ranks, number
        of samples that differ from it).
    """
    victim = Victim(run, folder, 1, steps)
    share = steps // len(worlds)
    for world in worlds[:-1]:
        with victim.start("every.save=1000", world=world) as ranks:
            ranks.until(lambda: ranks.steps() >= share)
            ranks.send(signal.SIGUSR1)
            ranks.wait()
        if not 0 < victim.newest() < steps:
            raise TrainingError(f"{world} ranks did not stop: {ranks.said()[-1000:]}")
        log.info("%d ranks stopped at step %d", world, victim.newest())
    with victim.start("every.save=1000", world=worlds[-1]) as ranks:
        _ended_well(ranks)
    with victim.start("every.save=1000", name="alone", world=worlds[0]) as ranks:
        _ended_well(ranks)
    error = largest_relative_error(victim.stage, folder / "alone" / "stage1")
    return error, wrong_samples(folder / "notes-run", folder / "notes-alone")


def _seconds_of_a_save(run: RunConfig, folder: Path) -> float:
    """The longest of some synchronous saves."""
    victim = Victim(run, folder, 1, 9)
    with victim.start("every.save=2", "every.save_async=false", name="saves") as ranks:
        _ended_well(ranks)
    stalls = [line["save_seconds"] for line in _metrics(folder / "saves" / "stage1")]
    return max(b - a for a, b in pairwise(stalls))


def _ended_well(ranks: Ranks) -> None:
    codes = ranks.wait(600)
    if any(codes):
        raise TrainingError(f"an undisturbed run failed: {codes}: {ranks.said()[-1500:]}")


def _metrics(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
