"""The fault campaign: kill, signal, resize, starve and damage a small run; what does it lose?

Two real ZeRO-3 ranks (one and four where the number changes) train on real tar shards through
`lbr-ds train`. The seeds are fixed; the exact instants depend on the machine.

1. kills, lost_steps, differing_bits: kill -9 of one rank or of all, between any two instructions
   of both stages; the run is restarted each time.
2. save_kills, unloadable: kill -9 between a checkpoint's first byte and its rename.
3. faults_injected, faults_named: faults of gradients, ranks, shards, disks and checkpoints.
4. signal_to_exit_excess_s, async_stall_over_sync, world_change_max_relative_error.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lbr_ds.bench.measure import Row, ratio
from lbr_ds.config import RunConfig
from tests.faults.damage import data_faults
from tests.faults.injected import Outcome, Scene, guard_faults, storage_faults
from tests.faults.kills import Campaign, Victim, kill_at_any_time, kill_in_saves
from tests.faults.small_run import small_run
from tests.faults.stops import change_worlds, signal_to_exit, stall_per_save

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """The extent of a campaign."""

    kills: tuple[int, int]  # in stage 1, in stage 2
    save_kills: int
    signals: int
    rounds: int  # of async against sync
    width: int  # of the model that is saved there
    worlds: tuple[tuple[int, ...], ...]
    faults: bool = True  # else the data's only


LONG = Size((32, 20), 200, 12, 7, 1024, ((1, 2, 1), (2, 4, 2)))
SHORT = Size((6, 0), 10, 2, 1, 64, ((1, 2, 1),), faults=False)


def suite(size: Size = LONG) -> list[Row]:
    """Run the campaign. LONG takes about 20 minutes on two idle cores, SHORT about two."""
    with tempfile.TemporaryDirectory(prefix="lbr-ds-faults-") as place:
        folder = Path(place)
        run = small_run(folder / "small", num_steps=1)
        rows = [
            *_kills(run, folder, size),
            *_save_kills(run, folder, size),
            *_faults(run, folder, size),
            *_stops(run, folder, size),
        ]
    return rows


def _kills(run: RunConfig, folder: Path, size: Size) -> list[Row]:
    found = Campaign()
    for stage, kills in enumerate(size.kills, 1):
        if kills:
            victim = Victim(run, folder / f"kills-{stage}", stage, 8 * kills, seed=stage)
            found += kill_at_any_time(victim, kills)
    where = ", ".join(f"{count} {name}" for name, count in sorted(found.where.items()))
    failed = f"; {found.unloadable} starts failed: {found.trouble}" if found.unloadable else ""
    return [
        count(
            "kills",
            found.kills,
            sum(size.kills),
            "higher",
            f"kill -9 of one rank or of both: {where}; restarted after each{failed}",
        ),
        count(
            "lost_steps",
            found.lost_steps + found.unloadable,
            0,
            "lower",
            "steps that a start fell back behind the newest whole checkpoint, and steps "
            "that are not in metrics.jsonl exactly once; a failed start counts as one",
        ),
        count(
            "differing_bits",
            found.differing_bits + found.wrong_samples,
            0,
            "lower",
            "against undisturbed runs: weights, optimizer and random states of every rank, each "
            "step's metrics; a sample drawn differently counts as one",
        ),
    ]


def _save_kills(run: RunConfig, folder: Path, size: Size) -> list[Row]:
    steps = 3 * size.save_kills + 10
    found = kill_in_saves(Victim(run, folder / "save-kills", 1, steps), size.save_kills)
    wrong = found.lost_steps + found.differing_bits + found.wrong_samples
    where = ", ".join(f"{count} {name}" for name, count in sorted(found.where.items()))
    return [
        count(
            "save_kills",
            found.kills,
            size.save_kills,
            "higher",
            f"kill -9 between a checkpoint's first byte and its rename: {where}",
        ),
        count(
            "unloadable",
            found.unloadable + (wrong > 0),
            0,
            "lower",
            f"of the starts after them; {found.lost_steps} lost steps, {found.differing_bits} "
            f"differing bits at the end {''.join(found.trouble)}".rstrip(),
        ),
    ]


def _faults(run: RunConfig, folder: Path, size: Size) -> list[Row]:
    scene = Scene(run, folder / "scene")
    found: list[Outcome] = data_faults(scene)
    if size.faults:
        found += guard_faults(scene) + storage_faults(scene)
    missed = [outcome for outcome in found if not outcome.named]
    for outcome in missed:
        log.warning("not named: %s: %s", outcome.fault, outcome.said)
    names = "; ".join(outcome.fault for outcome in found)
    lost = f"; not named: {', '.join(o.fault for o in missed)}" if missed else ""
    return [
        count("faults_injected", len(found), len(found), "higher", names),
        count(
            "faults_named",
            len(found) - len(missed),
            len(found),
            "higher",
            "right exit code, required words in the output, whole checkpoints, skipped samples "
            f"counted exactly{lost}",
        ),
    ]


def _stops(run: RunConfig, folder: Path, size: Size) -> list[Row]:
    excess = signal_to_exit(run, folder / "signals", size.signals)
    low, high = _quartiles(excess)
    wide = small_run(folder / "wide", num_steps=1, width=size.width)
    stalls = stall_per_save(wide, folder / "stalls", size.rounds)
    changes = {
        worlds: change_worlds(run, folder / f"worlds-{number}", worlds, 12)
        for number, worlds in enumerate(size.worlds)
    }
    errors = {worlds: error + otherwise for worlds, (error, otherwise) in changes.items()}
    each = ", ".join(
        f"{' -> '.join(map(str, worlds))}: {error:.1e}" for worlds, error in errors.items()
    )
    return [
        Row(
            "signal_to_exit_excess_s",
            max(excess),
            "s",
            1.0,
            "lower",
            1.0,
            (low, high),
            len(excess),
            "largest time from a signal to the end of all ranks, beyond the longest "
            "step and one save",
        ),
        ratio(
            "async_stall_over_sync",
            stalls,
            goal=0.10,
            better="lower",
            floor=0.25,
            about=f"seconds that training waits for a save, width {size.width}",
        ),
        Row(
            "world_change_max_relative_error",
            max(errors.values()),
            "ratio",
            1e-6,
            "lower",
            1e-6,
            (min(errors.values()), max(errors.values())),
            len(errors),
            f"|a - b| / |b| of the worst tensor of the weights, stopped and resumed on other "
            f"numbers of ranks: {each}; a sample drawn differently counts as 1",
        ),
    ]


def count(
    measure: str, value: int, wanted: int, better: Literal["lower", "higher"], about: str
) -> Row:
    """Return the row of a count, which must be `wanted` or better."""
    return Row(measure, value, "count", wanted, better, wanted, (value, value), 1, about)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
