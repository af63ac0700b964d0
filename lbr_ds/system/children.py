"""Child processes that do not outlive their parent and receive its signals.

    done = children.run([sys.executable, "-m", "lbr_ds", "train", ...])

A process of this package calls `follow_starter` or `follow` first. From then on one of its threads
compares the parent's process id with that of the process that started it. They differ as soon as
that process has ended, for whatever reason, since the system gives orphans another parent. Unlike
the kernel's parent-death signal, this does not depend on the thread that started the child, leaves
time to save, and ends a process that does not react to signals. Other programs cannot run such a
thread; `following_command` wraps their command line and uses the kernel's signal.
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
# Seconds to save after the parent has ended; a launcher and its ranks may need them in turn.
GRACE = 6.0
_POLL_SECONDS = 0.5
_STARTER = "LBR_DS_STARTER"  # environment variable: process id of the starting process
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How a child ended, and the signals that were forwarded to it."""

    code: int  # as in shells: 128 + N if signal N ended it
    signals: list[int]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment that tells a child which process to follow.

    Args:
        env: the variables to extend; by default those of this process.
    """
    return {**(os.environ if env is None else env), _STARTER: str(os.getpid())}


def following_command(words: Sequence[str]) -> list[str]:
    """Return a command line that runs another program so that it follows this process.

    It must be started in `environment()`. `-m MODULE ...` runs a Python module; the processes that
    it forks follow it, too.
    """
    return [sys.executable, "-m", "lbr_ds.system.children", *words]


def run(words: Sequence[str]) -> Ended:
    """Run a program of this package until it ends, forwarding signals to it."""
    children: list[subprocess.Popen[bytes]] = []
    with forward_signals(children) as signals:
        children.append(subprocess.Popen(words, env=environment()))
        send_signals(children, signals)
        code = children[0].wait()
    return Ended(shell_exit_code(code), signals)


def run_verb(*arguments: str) -> None:
    """Run `lbr-ds ARGUMENTS` in a process of its own, forwarding signals to it.

    Raises:
        LbrError: the verb failed or was stopped. It has the verb's exit code, or 85 if the verb
            succeeded although this process received a signal to stop.
    """
    ended = run([sys.executable, "-m", "lbr_ds", *arguments])
    code = ended.code or (SAVED_AND_STOPPED if ended.signals else 0)
    if code:
        why = f" by {signal.Signals(ended.signals[0]).name}" if ended.signals else ""
        error = LbrError(f"stopped{why} at `lbr-ds {' '.join(arguments)}`")
        error.exit_code = code
        # The verb has printed its reason, unless a signal ended it.
        error.reported = 0 < ended.code < 128 and not ended.signals
        raise error


def shell_exit_code(code: int) -> int:
    """Return a child's exit code as shells do: 128 + N if signal N ended it."""
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def forward_signals(children: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward FORWARDED_SIGNALS, while the block runs, to the children that still run.

    Yields the list of the signals received. A child that is started inside may have missed some
    (see `send_signals`). Only the main thread can handle signals; other threads forward nothing.
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
    """Follow the process that started this program, if it used `environment()`.

    Call it first and once, so that processes started later follow this one.
    """
    if (starter := _starter()) is not None:
        follow(starter, GRACE)


def follow(parent: int, grace: float = 0.0) -> None:
    """End this process soon after `parent`, the process that started it, has ended.

    Args:
        parent: process id of the parent. If it has ended already, this process ends at once.
        grace: seconds between a SIGTERM to this process and its end, for handlers that save.
    """
    if os.getppid() != parent:
        os._exit(LostRank.exit_code)
    threading.Thread(target=_watch, args=(parent, grace), name="parent", daemon=True).start()


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
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
    """Become another program; see `following_command`."""
    if words[0] == "-m":
        follow_starter()
        os.register_at_fork(after_in_child=_follow_in_fork)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    starter = _starter()
    # The kernel keeps this setting through exec. The signal is sent when the thread that started
    # this process ends; that thread waits for the command.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if starter is not None and os.getppid() != starter:
        os._exit(LostRank.exit_code)
    os.execvp(words[0], words)


_self = os.getpid()
if __name__ == "__main__":
    _become(sys.argv[1:])
