"""Updates that are left out: a loss or a gradient that is not finite or, if wanted, far off.

Every number that is judged comes from an all-reduce, so all ranks decide alike without a word. The
guard's state goes into checkpoints: a resumed run leaves out the same updates.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_ds.config import GuardConfig
from lbr_ds.distributed import World
from lbr_ds.errors import TrainingError
from lbr_ds.shards import Manifest
from lbr_ds.shards.manifest import ShardFile
from lbr_ds.train.meter import forget_after
from lbr_ds.train.stages import Work

log = logging.getLogger(__name__)
NAME = "skipped.jsonl"
WINDOW = 128  # steps whose loss and norm a new one is compared with (OLMo's rule, 6 sigma)
_NAMED = 4  # samples that the log names; the file has all


class Guard:
    """Judges each step before its update, and counts. counters: what `state` gave, {} at first."""

    def __init__(
        self, config: GuardConfig, counters: dict[str, Any], folder: Path, start: int, world: World
    ) -> None:
        """folder: RUN/stageN, whose skipped.jsonl loses the steps after `start`."""
        self.config, self.folder, self.world = config, folder, world
        self.total: int = counters.get("skipped_updates", 0)
        self.in_a_row: int = counters.get("skipped_in_a_row", 0)
        self.samples: int = counters.get("skipped_samples", 0)  # that could not be read
        self.losses = deque[float](counters.get("losses", ()), maxlen=WINDOW)
        self.norms = deque[float](counters.get("norms", ()), maxlen=WINDOW)
        self.reason = ""
        if world.first:
            forget_after(folder / NAME, start)

    def state(self) -> dict[str, Any]:
        """JSON-ready, for a checkpoint; floats come back bit for bit."""
        return {
            "skipped_updates": self.total,
            "skipped_in_a_row": self.in_a_row,
            "skipped_samples": self.samples,
            "losses": list(self.losses),
            "norms": list(self.norms),
        }

    def judge(self, loss: float) -> Callable[[float], bool]:
        """What `Engine.step` asks with the gradient's norm; `reason` then says why not, or ""."""

        def accept(norm: float) -> bool:
            self.reason = self._reason(loss, norm)
            return not self.reason

        self.reason = f"loss {loss:.6g}, gradient norm not finite"  # where the engine never asks
        return accept

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.6g}, gradient norm {norm:.6g}"
        if self.config.spike_sigmas is None:
            return ""
        found = [
            _spike("loss", loss, self.losses, self.config.spike_sigmas),
            _spike("gradient norm", norm, self.norms, self.config.spike_sigmas),
        ]
        # A spike goes into the window too: what has become the rule is soon no spike any more.
        self.losses.append(loss)
        self.norms.append(norm)
        return "; ".join(filter(None, found))

    def count(self, work: Work, applied: bool, skipped: int, data: Path | str, split: str) -> None:
        """Note a step that is over; name its samples if its update was left out. All ranks call it.

        skipped: samples of the step that no rank could read. Raises TrainingError, on all ranks,
        when too many updates were left out.
        """
        self.samples += skipped
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied:
            return
        self.total += 1
        samples = self.world.collect(work.names)
        if self.world.first:
            self._name(work.step + 1, samples, Manifest.load(data).shards(split))
        for key, number in (("max_skipped", self.in_a_row), ("max_skipped_total", self.total)):
            if number > (limit := getattr(self.config, key)):
                raise TrainingError(
                    f"step {work.step + 1}: {self.reason}; {number} updates left out, more than "
                    f"guard.{key}={limit}. Look at the samples in {self.folder / NAME} or lower "
                    "optim.lr; the last checkpoint stands"
                )

    def _name(
        self, step: int, samples: list[list[tuple[str, int, int]]], shards: list[ShardFile]
    ) -> None:
        """The step's samples, in the log and in skipped.jsonl."""
        names = [
            [f"{name} ({shards[shard].file} record {row})" for name, shard, row in own]
            for own in samples
        ]
        every = [name for own in names for name in own]
        more = f" and {len(every) - _NAMED} more in {NAME}" if len(every) > _NAMED else ""
        log.warning(
            "step %d: %s; update left out. Its samples: %s%s",
            step,
            self.reason,
            ", ".join(every[:_NAMED]),
            more,
        )
        line = {"step": step, "reason": self.reason, "samples": dict(enumerate(names))}
        with (self.folder / NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _spike(what: str, value: float, window: deque[float], sigmas: float) -> str:
    """Why `value` is one, else "". A window that is less than half full judges nothing."""
    if len(window) < WINDOW // 2:
        return ""
    mean, deviation = statistics.fmean(window), statistics.pstdev(window)
    if value <= mean + sigmas * deviation:
        return ""
    return f"{what} {value:.4g} is more than {sigmas:g} sigmas above the mean {mean:.4g}"
