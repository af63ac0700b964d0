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
from lbr_ds.errors import TrainingError

log = logging.getLogger(__name__)
WINDOW = 128  # steps whose loss and norm a new one is compared with (OLMo's rule, 6 sigma)
_NAMED = 4  # samples that the log names; the file has all


class Guard:
    """Judges each step before its update. `counters` is what `state` gave, {} at a start."""

    def __init__(self, config: GuardConfig, counters: dict[str, Any]) -> None:
        self.config = config
        self.total: int = counters.get("skipped_updates", 0)
        self.in_a_row: int = counters.get("skipped_in_a_row", 0)
        self.losses = deque[float](counters.get("losses", ()), maxlen=WINDOW)
        self.norms = deque[float](counters.get("norms", ()), maxlen=WINDOW)
        self.reason = ""

    def state(self) -> dict[str, Any]:
        """JSON-ready, for a checkpoint; floats come back bit for bit."""
        found: dict[str, Any] = {
            "skipped_updates": self.total,
            "skipped_in_a_row": self.in_a_row,
        }
        if self.config.spike_sigmas is not None:
            found |= {"losses": list(self.losses), "norms": list(self.norms)}
        return found

    def judge(self, loss: float) -> Callable[[float], bool]:
        """What `Engine.step` asks with the gradient's norm; `reason` then says why not, or ""."""

        def accept(norm: float) -> bool:
            self.reason = self._reason(loss, norm)
            return not self.reason

        self.reason = f"loss {loss}, gradient norm not finite"  # where the engine never asks
        return accept

    def _reason(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        found = [
            _spike(what, value, window, self.config.spike_sigmas)
            for what, value, window in (
                ("loss", loss, self.losses),
                ("gradient norm", norm, self.norms),
            )
        ]
        # A spike goes into the window too: what has become the rule is soon no spike any more.
        self.losses.append(loss)
        self.norms.append(norm)
        return "; ".join(filter(None, found))

    def count(self, step: int, applied: bool) -> None:
        """Note step `step` (from 1). Raises TrainingError, alike on all ranks, when it is enough."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied
        for key, number in (("max_skipped", self.in_a_row), ("max_skipped_total", self.total)):
            if number > (limit := getattr(self.config, key)):
                raise TrainingError(
                    f"step {step}: {self.reason}; {number} updates were left out, more than "
                    f"guard.{key}={limit}. Look at the samples in skipped.jsonl beside "
                    "metrics.jsonl, or lower optim.lr; the last checkpoint stands"
                )


def _spike(what: str, value: float, window: deque[float], sigmas: float | None) -> str:
    """Why `value` is one, else "". A window that is less than half full judges nothing."""
    if sigmas is None or len(window) < WINDOW // 2:
        return ""
    mean, deviation = statistics.fmean(window), statistics.pstdev(window)
    if value <= mean + sigmas * deviation:
        return ""
    return f"{what} {value:.4g}, more than {sigmas:g} sigmas above the mean {mean:.4g}"


def report_skip(folder: Path, step: int, reason: str, samples: list[list[str]]) -> None:
    """Name a step's samples in the log and in `folder/skipped.jsonl`. Rank 0.

    samples: of each rank, "id (shard record number)".
    """
    every = [name for own in samples for name in own]
    more = f" and {len(every) - _NAMED} more in skipped.jsonl" if len(every) > _NAMED else ""
    log.warning(
        "step %d: %s; update left out. Its samples: %s%s",
        step, reason, ", ".join(every[:_NAMED]), more,
    )  # fmt: skip
    line = {"step": step, "reason": reason, "samples": dict(enumerate(samples))}
    with (folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
