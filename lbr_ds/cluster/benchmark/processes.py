"""Start the ranks of one configuration, wait for them, and say why they failed."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lbr_ds.errors import ConfigError
from lbr_ds.system import children

_GRACE_SECONDS = 30  # for a configuration to end after the sweep was asked to


def rank_command(
    words: Sequence[str], ranks: int, launcher: str, fills: Mapping[str, object]
) -> list[str]:
    """Return the command line that starts `ranks` ranks of `lbr-ds WORDS`.

    Args:
        words: arguments of lbr-ds.
        ranks: number of ranks.
        launcher: the launcher's command, which ends with the program; empty: ranks of this machine.
        fills: what replaces {nodes}, {ranks}, {per_node} and {log} in it.
    """
    if not launcher:
        return [sys.executable, "-m", "lbr_ds", *words, "--nproc", str(ranks)]
    filled = shlex.split(launcher)
    for name, value in fills.items():
        filled = [word.replace(f"{{{name}}}", str(value)) for word in filled]
    return [*filled, *words]


def run_command(words: list[str], output: Path) -> int:
    """Run a command that prints into `output` and return its exit code.

    The command does not outlive this call.

    Raises:
        ConfigError: there is no such program.
    """
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--launcher: {words[0]} cannot be started: no such program is found")
    if words[0] != sys.executable:
        words = children.following_command(words)
    with output.open("wb") as file:
        child = subprocess.Popen(
            words,
            env=children.environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that `finally` runs as it does for Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_MEMORY = re.compile(
    r"out ?of ?memory|can't allocate memory|Cannot allocate memory|oom.kill|MemoryError",
    re.IGNORECASE,
)
_ERROR = re.compile(r"(\S+: )?[\w.]*(Error|Exception)\b.*")
_OURS = "lbr-ds: error: "


def failure_reason(printed: str, code: int) -> str:
    """Return the line of the ranks' output that says why a configuration failed."""
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    for line in lines:
        if _MEMORY.search(line):
            return f"out of memory: {line[:200]}"
    ours = [line.split(_OURS, 1)[1] for line in lines if _OURS in line]
    ours = [line for line in ours if not line.startswith("another rank ended")]
    raised = [line for line in lines if _ERROR.match(line)]
    reason = next(iter([*ours, *raised]), lines[-1] if lines else "nothing was printed")
    return f"{reason[:300]} (exit code {code})"
