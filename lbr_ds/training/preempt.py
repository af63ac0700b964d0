"""Turn signals into a flag that all ranks agree on at the end of a step."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType
from typing import Any

from lbr_ds.distributed import World

_SAME_SIGNAL = 5.0  # seconds within which two signals count as one
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)


class Preemption:
    """Context manager in which SIGUSR1, SIGUSR2 and SIGTERM only set a flag.

    A second SIGTERM kills, but only some seconds later: a launcher passes on what a scheduler sent
    to every process, so the first one may come twice.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signalled = 0
        self._since = math.inf  # by time.monotonic
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM and now - self._since > _SAME_SIGNAL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._since = min(now, self._since)
        self.signalled = number

    def agreed(self) -> bool:
        """Return whether any rank received a signal. All ranks call it at the same step."""
        return self.world.max(self.signalled)[0] > 0
