"""Skip updates whose loss or gradient norm is not finite or, optionally, is an outlier.

Every value that is checked comes from an all-reduce, so all ranks decide alike without
communication. The guard's state is part of checkpoints: a resumed run skips the same updates.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lbr_ds.config import GuardConfig
from lbr_ds.distributed import World
from lbr_ds.errors import TrainingError
from lbr_ds.shards import Manifest
from lbr_ds.shards.manifest import ShardFile
from lbr_ds.training.work import SampleName, Work

log = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"
WINDOW = 128  # steps whose loss and norm a new one is compared with (OLMo's rule, 6 sigma)
_NAMED = 4  # samples that the log names; the file names all


class Guard:
    """Decides before each update whether it is applied, and counts the skipped ones.

    Attributes:
        total: Number of skipped updates.
        in_a_row: Number of updates skipped since the last applied one.
        samples: Number of samples that could not be read.
        reason: Why the last update was skipped, or "".
    """

    def __init__(self, config: GuardConfig, folder: Path, world: World) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.reason = ""
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, ready for JSON; floats are restored bit for bit."""
        return {
            "skipped_updates": self.total,
            "skipped_in_a_row": self.in_a_row,
            "skipped_samples": self.samples,
            "losses": list(self.losses),
            "norms": list(self.norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; {}: the state at step 0."""
        self.total: int = state.get("skipped_updates", 0)
        self.in_a_row: int = state.get("skipped_in_a_row", 0)
        self.samples: int = state.get("skipped_samples", 0)
        self.losses = deque[float](state.get("losses", ()), maxlen=WINDOW)
        self.norms = deque[float](state.get("norms", ()), maxlen=WINDOW)

    def accepts(self, loss: float, norm: float) -> bool:
        """Return whether an update of this loss and gradient norm is applied; set `reason`."""
        self.reason = self._reason(loss, norm)
        return not self.reason

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.6g}, gradient norm {norm:.6g}"
        if self.config.spike_sigmas is None:
            return ""
        spikes = [
            _spike("loss", loss, self.losses, self.config.spike_sigmas),
            _spike("gradient norm", norm, self.norms, self.config.spike_sigmas),
        ]
        # A spike enters the window too, so a lasting change soon counts as normal.
        self.losses.append(loss)
        self.norms.append(norm)
        return "; ".join(filter(None, spikes))

    def record(
        self, work: Work, applied: bool, skipped: int, data: Path | str, splits: Sequence[str]
    ) -> None:
        """Record a step, with its samples if its update was skipped. All ranks call it.

        Args:
            work: This rank's share of the step.
            applied: Whether the update was applied.
            skipped: Samples of the step that no rank could read.
            data: The prepared data.
            splits: The split that the stage trains on, and that of the batch that it replays.

        Raises:
            TrainingError: On all ranks, when too many updates were skipped.
        """
        self.samples += skipped
        self.in_a_row = 0 if applied else self.in_a_row + 1
        if applied:
            return
        self.total += 1
        found = [self.world.collect(part.names) for part in (work, work.replay) if part]
        if self.world.first:
            shards = map(Manifest.load(data).shards, splits)
            self._name(work.step + 1, zip(found, shards, strict=True))
        for key, number in (("max_skipped", self.in_a_row), ("max_skipped_total", self.total)):
            if number > (limit := getattr(self.config, key)):
                raise TrainingError(
                    f"step {work.step + 1}: {self.reason}; {number} updates skipped, more than "
                    f"guard.{key}={limit}. Check the samples in {self.folder / SKIPPED} or lower "
                    "optim.lr; the last checkpoint is kept"
                )

    def _name(
        self, step: int, parts: Iterable[tuple[list[list[SampleName]], list[ShardFile]]]
    ) -> None:
        """Write the names of the step's samples to the log and to skipped.jsonl.

        Args:
            step: Number of the step.
            parts: For each split the names of each rank's samples, and its shards.
        """
        names = [list[str]() for _ in range(self.world.size)]
        for samples, shards in parts:
            for own, found in zip(names, samples, strict=True):
                own += [f"{name} ({shards[i].file} record {row})" for name, i, row in found]
        every = [name for own in names for name in own]
        more = f" and {len(every) - _NAMED} more in {SKIPPED}" if len(every) > _NAMED else ""
        log.warning(
            "step %d: %s; update skipped. Its samples: %s%s",
            step,
            self.reason,
            ", ".join(every[:_NAMED]),
            more,
        )
        line = {"step": step, "reason": self.reason, "samples": dict(enumerate(names))}
        with (self.folder / SKIPPED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _spike(what: str, value: float, window: deque[float], sigmas: float) -> str:
    """Return why `value` is an outlier, or ""; never for a window less than half full."""
    if len(window) < WINDOW // 2:
        return ""
    mean, deviation = statistics.fmean(window), statistics.pstdev(window)
    if value <= mean + sigmas * deviation:
        return ""
    return f"{what} {value:.4g} is more than {sigmas:g} sigmas above the mean {mean:.4g}"
