"""Child processes that do not outlive their parent, and get its signals.

    done = children.run([sys.executable, "-m", "lbr_ds", "train", ...])

A program of ours, or a process of a pool, calls `follow_starter` or `follow` first. From then on a
thread of it compares the parent's process id with that of the process that started it. They differ
as soon as that one has ended, however it did: the system gives orphans another parent. Unlike the
kernel's parent-death signal, this does not depend on the thread that started the child, leaves time
to save, and ends a process that does not react to signals. A program of others cannot run such a
thread; `following_command` wraps its command line, and there the kernel's signal has to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

from lbr_ds.errors import SAVED_AND_STOPPED, LbrError, LostRank

log = logging.getLogger(__name__)

FORWARDED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# Seconds to save after the parent's end. A launcher and its ranks may need it one after the other.
GRACE = 6.0
_LOOK = 0.5  # seconds between two looks at the parent
_STARTER = "LBR_DS_STARTER"  # the process id of the one that starts a program
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How a child ended, and the signals that were passed on to it."""

    code: int  # as shells say it: 128 + N for one that signal N has ended
    signals: list[int]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which a child finds out whom it has to follow.

    Args:
        env: the environment to add it to; this process's by default.
    """
    return {**(os.environ if env is None else env), _STARTER: str(os.getpid())}


def following_command(words: Sequence[str]) -> list[str]:
    """Return the command line that starts `words`, a program of others, in `environment()`.

    `-m MODULE ...` is a Python module of others: the processes that it forks follow it, too.
    """
    return [sys.executable, "-m", "lbr_ds.system.children", *words]


def run(words: Sequence[str]) -> Ended:
    """Run a program of ours on this terminal until it ends, and pass signals on to it."""
    children: list[subprocess.Popen[bytes]] = []
    with forward_signals(children) as signals:
        children.append(subprocess.Popen(words, env=environment()))
        send_signals(children, signals)
        code = children[0].wait()
    return Ended(shell_exit_code(code), signals)


def run_verb(*arguments: str) -> None:
    """Run `lbr-ds ARGUMENTS`; signals to this process reach it.

    Raises:
        LbrError: it failed or was stopped; with its exit code, and 85 when it had reached its own
            end although this process was told to stop.
    """
    ended = run([sys.executable, "-m", "lbr_ds", *arguments])
    code = ended.code or (SAVED_AND_STOPPED if ended.signals else 0)
    if code:
        why = f" by {signal.Signals(ended.signals[0]).name}" if ended.signals else ""
        error = LbrError(f"stopped{why} at `lbr-ds {' '.join(arguments)}`")
        error.exit_code = code
        # The verb's own line says why, unless a signal has ended it.
        error.reported = 0 < ended.code < 128 and not ended.signals
        raise error


def shell_exit_code(code: int) -> int:
    """Return a child's exit code as shells say it: 128 + N for one that signal N has ended."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def forward_signals(children: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass the signals PASSED_ON, which come inside, on to the children that still run.

    Yields the list of those that came. A child that is started inside may have missed some: see
    `send_signals`. Only the main thread can handle signals; in another one nothing is forwarded.
    """
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        send_signals(children, [number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, pass_on) for number in FORWARDED_SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send_signals(children: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> None:
    """Send signals to the children that still run."""
    for child in children:
        for number in signals:
            child.send_signal(number)  # does nothing to one that has ended


def follow_starter() -> None:
    """Follow the process that started this program, if it did so in `environment()`.

    A program does this first, and once: what it starts itself shall follow it and nobody else.
    """
    if (starter := _starter()) is not None:
        follow(starter, GRACE)


def follow(parent: int, grace: float = 0.0) -> None:
    """End this process soon after `parent`, the process that started it, has ended.

    Args:
        parent: its process id, as the parent itself has told it; when it has ended already, this
            process ends at once.
        grace: seconds between a SIGTERM to this process and its end, for handlers that save.
    """
    if os.getppid() != parent:
        os._exit(LostRank.exit_code)
    threading.Thread(target=_watch, args=(parent, grace), name="parent", daemon=True).start()


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK)
    if grace:
        log.warning(
            "the parent process %d has ended, so this process stops; training first tries to save "
            "a checkpoint",
            parent,
        )
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
    os._exit(LostRank.exit_code)


def _starter() -> int | None:
    starter = os.environ.pop(_STARTER, "")
    return int(starter) if starter.isdigit() else None


def _follow_in_fork() -> None:
    global _self
    parent, _self = _self, os.getpid()
    follow(parent)


def _become(words: list[str]) -> None:
    """Go on as a program of others; see `following_command`."""
    if words[0] == "-m":
        follow_starter()
        os.register_at_fork(after_in_child=_follow_in_fork)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    starter = _starter()
    # The kernel keeps this through exec. It comes when the thread that started this process ends;
    # that thread waits for the command.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if starter is not None and os.getppid() != starter:
        os._exit(LostRank.exit_code)
    os.execvp(words[0], words)


_self = os.getpid()
if __name__ == "__main__":
    _become(sys.argv[1:])
