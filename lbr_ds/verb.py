"""One verb of the command line in a process of its own, speaking on this terminal."""

from __future__ import annotations

import subprocess
import sys

from lbr_ds.errors import LbrError


def run_verb(*arguments: str) -> None:
    """`lbr-ds ARGUMENTS`. Raises LbrError with its exit code when it fails."""
    done = subprocess.run([sys.executable, "-m", "lbr_ds", *arguments])
    if done.returncode:
        error = LbrError(f"stopped at `lbr-ds {' '.join(arguments)}`")
        error.exit_code = done.returncode
        error.told = done.returncode > 0  # the verb's own line says why; a signal leaves none
        raise error
