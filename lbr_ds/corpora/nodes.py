"""Coordinate several nodes that prepare one folder: which are alive, and which phase runs.

All of them see the folder `.NAME.lbr-nodes` next to `data.folder`. Node 0 leads: it runs `prepare`
and announces phases there; the other nodes do their share of each phase. Every node touches a file
once a second, so that the others notice when it has ended. No clocks are compared: a node is alive
while the time of its file changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lbr_ds.errors import EnvironmentProblem, LbrError, PeerFailed
from lbr_ds.system.atomic import write_json
from lbr_ds.system.failures import as_lbr_error
from lbr_ds.system.locks import hidden_sibling

_POLL, _BEAT = 0.2, 1.0  # seconds between looks, and between two signs of life
LOST = 180.0  # seconds without a sign of life; file systems report changes up to a minute late
LEAVE = 120.0  # seconds that node 0 waits in the end for the others to have noticed


class Spread(NamedTuple):
    """How several nodes share the preparation of one folder.

    Attributes:
        tasks: Into how many tasks the engine divides each phase.
        node: The number of this node.
        nodes: How many there are.
    """

    tasks: int
    node: int = 0
    nodes: int = 1


class Nodes:
    """This node's place among those that prepare a folder.

    Args:
        target: The folder that is prepared.
        node: The number of this node; 0 leads.
        nodes: How many there are.
    """

    def __init__(self, target: Path, node: int = 0, nodes: int = 1) -> None:
        self.folder = hidden_sibling(Path(os.path.realpath(target)), "lbr-nodes")
        self.node, self.nodes = node, nodes
        self._session = secrets.token_hex(8)
        self._announced = 0
        self._signs: list[_Sign] = []

    @contextlib.contextmanager
    def lead(self) -> Iterator[None]:
        """Be node 0 while the block runs; the others end with it."""
        if self.nodes == 1:
            yield
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.folder.mkdir(parents=True)
        others = range(1, self.nodes)
        self._signs = [_Sign(self.folder / f"alive-{number}") for number in others]
        with _alive(self.folder / "alive-0"):
            end = "failed"
            try:
                yield
                end = "done"
            finally:
                with contextlib.suppress(OSError):  # a full disk: the sign of life ends, too
                    self._announce(end=end)
                    left = [self.folder / f"left-{number}" for number in others]
                    _wait(lambda: all(path.exists() for path in left), LEAVE)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, phase: Path, tasks: int) -> None:
        """Announce a phase, whose folder all nodes see."""
        if self.nodes > 1:
            self._announce(phase=str(phase), tasks=tasks)

    def finish(self, done: Callable[[], bool]) -> None:
        """Wait until the tasks of all nodes are done.

        Raises:
            LbrError: Another node has failed, or has ended.
        """
        while not done():
            for number, sign in enumerate(self._signs, 1):
                self._check(number, sign)
            time.sleep(_POLL)

    def _announce(self, **what: Any) -> None:
        self._announced += 1
        value = {"session": self._session, "number": self._announced, **what}
        write_json(self.folder / "phase.json", value)

    def _check(self, number: int, sign: _Sign) -> None:
        with contextlib.suppress(FileNotFoundError):
            message = json.loads((self.folder / f"failed-{self._session}-{number}").read_bytes())
            line = f"node {number} of {self.nodes} ({message['host']}): {message['line']}"
            raise PeerFailed(line, message["code"], reported=False)
        if sign.silent() > LOST:
            state = "has ended" if sign.moved else "has not started"
            raise EnvironmentProblem(
                f"node {number} of {self.nodes} {state}, see its output; start prepare again on "
                "all nodes; it resumes there"
            )

    def assist(self, work: Callable[[Path, int], None]) -> None:
        """Be another node: call `work(folder of the phase, tasks)` for each phase until the end.

        Raises:
            EnvironmentProblem: Node 0 has failed or ended, or did not start.
        """
        leader = _Sign(self.folder / "alive-0")
        _wait(lambda: leader.silent() == 0 and leader.moved, LOST)
        if not leader.moved:
            raise EnvironmentProblem(
                f"node {self.node} of {self.nodes}: node 0 has not started within {LOST:.0f} s, or "
                f"does not see {self.folder}; data.folder must be on a disk that all nodes share"
            )
        with _alive(self.folder / f"alive-{self.node}"):
            try:
                self._follow(leader, work)
            finally:
                with contextlib.suppress(OSError):
                    (self.folder / f"left-{self.node}").touch()

    def _follow(self, leader: _Sign, work: Callable[[Path, int], None]) -> None:
        seen = 0
        while True:
            message = self._announcement()
            if message.get("number", 0) <= seen:
                if leader.silent() > LOST:
                    raise EnvironmentProblem(_LED.format("has ended"))
                time.sleep(_POLL)
                continue
            seen = message["number"]
            if "end" in message:
                if message["end"] == "failed":
                    raise EnvironmentProblem(_LED.format("has failed"))
                return
            try:
                work(Path(message["phase"]), message["tasks"])
            except Exception as error:
                self._report(message["session"], as_lbr_error(error))
                raise

    def _announcement(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads((self.folder / "phase.json").read_bytes())
        except OSError:
            return {}
        return message

    def _report(self, session: str, error: LbrError) -> None:
        message = {"line": str(error), "code": error.exit_code, "host": socket.gethostname()}
        with contextlib.suppress(OSError):
            write_json(self.folder / f"failed-{session}-{self.node}", message)


_LED = "node 0 {}, see its output; start prepare again on all nodes; it resumes there"


class _Sign:
    """Another node's sign of life."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: int | None = None
        self._changed = time.monotonic()
        self.moved = False  # whether it changed while it was watched

    def silent(self) -> float:
        """Return the seconds since it changed, as far as this process has seen."""
        try:
            now: int | None = self._path.stat().st_mtime_ns
        except OSError:
            now = None
        if now is not None and now != self._last:
            self.moved = self._last is not None
            self._last, self._changed = now, time.monotonic()
            return 0.0
        return time.monotonic() - self._changed


@contextlib.contextmanager
def _alive(path: Path) -> Iterator[None]:
    """Give signs of life while the block runs; they need no space on the disk."""
    path.touch()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    """Return when a condition holds, or after some time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_POLL)
