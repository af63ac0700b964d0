"""One verb of the command line in a process of its own, speaking on this terminal."""

from __future__ import annotations

import signal
import sys

from lbr_ds.errors import SAVED_AND_STOPPED, LbrError
from lbr_ds.system import children


def run_verb(*arguments: str) -> None:
    """Run `lbr-ds ARGUMENTS`; signals to this process reach it.

    Raises:
        LbrError: it failed or was stopped; with its exit code, and 85 when it had reached its own
            end although this process was told to stop.
    """
    ended = children.run([sys.executable, "-m", "lbr_ds", *arguments])
    code = ended.code or (SAVED_AND_STOPPED if ended.signals else 0)
    if code:
        why = f" by {signal.Signals(ended.signals[0]).name}" if ended.signals else ""
        error = LbrError(f"stopped{why} at `lbr-ds {' '.join(arguments)}`")
        error.exit_code = code
        # The verb's own line says why, unless a signal has ended it.
        error.told = 0 < ended.code < 128 and not ended.signals
        raise error
