"""A rank that dies or hangs ends the whole job, soon and with its name.

Each rank's watch tells the others, through the store they met at, where the rank stands (a beat),
and reads where they stand. It ends this process when

- another rank has failed: it left its last words, and those say with which code to end;
- another rank is silent: its process or node is gone, or stopped;
- no rank has got anywhere for `engine.timeout_minutes`: the one furthest behind is named.

A collective that breaks because a peer is gone becomes the same one line. Only one process prints
it; the others keep it in their log. The training thread pays an assignment for each mark. A thread
talks and another judges: a store whose host was cut off answers nothing and breaks nothing either.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from lbr_ds.distributed import World, end, is_collective_error
from lbr_ds.errors import LbrError, LostRank, PeerFailed, short
from lbr_ds.system.failures import as_lbr_error
from lbr_ds.system.urls import mask_secrets

_LOOK = 0.05  # seconds between two looks at what the training thread does
_STOPPED = 1.0  # seconds from which a gap between two looks does not count
_BEAT = 1.0  # seconds between two beats, for up to _RANKS ranks; more in proportion
_RANKS = 64
_MISSED = 3.5  # beats that a rank may miss when a collective has broken, before it is the one
_SILENT = 120.0  # seconds without a beat; a thread may wait that long for a large pickle
_PATIENCE = 5.0  # seconds that the training thread has to end by itself after a peer's failure
_STEPS = 20  # own seconds are averaged over so many steps


class Beat(NamedTuple):
    """What a rank says of itself; `number` rises with every beat, `marks` with its progress."""

    number: int
    marks: int
    step: int
    doing: str
    waits: bool  # for the other ranks, in a collective
    host: str

    def __str__(self) -> str:
        return f"on {self.host}, last seen in step {self.step} ({self.doing})"


@dataclass
class _Seen:
    """A rank's newest beat, and when it changed, in seconds that this process has run."""

    beat: Beat
    at: float


class Watch:
    """`with Watch(world, minutes) as watch:` around a stage; `watch.mark(...)` at its progress.

    Leaving it with an error leaves that error's line for the other ranks. Raises LostRank or
    PeerFailed in place of a collective's error.
    """

    def __init__(self, world: World, minutes: float) -> None:
        self.world, self.limit = world, 60 * minutes
        self.words: tuple[int, str] | None = None  # a peer's exit code and line
        self.verdict = ""  # which ranks are silent, or that none gets on
        self.step, self._doing, self._marks, self._count = 0, "starts", 0, 0
        self._looks = [0, 0]  # at the training thread at work, and waiting for others
        self._steps = deque[tuple[int, int, float]](maxlen=_STEPS)
        self._seen: dict[int, _Seen] = {}
        self._ran = 0.0  # seconds, without those in which this process was stopped (suspended)
        self._progress = (-1, 0.0)  # marks of all ranks, and since when
        self._lost_store = False
        self._heard = 0.0  # when the store has last answered, by the same clock
        self._watched = threading.get_ident()
        self._woken, self._done = threading.Event(), threading.Event()

    def __enter__(self) -> Watch:
        for work in (self._look, self._talk) if self.world.store else (self._look,):
            threading.Thread(target=work, name="watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and is_collective_error(error):
            found = self._blame(error)
            self._leave()
            raise found from error
        if error is not None:
            found = (
                as_lbr_error(error)
                if isinstance(error, Exception)
                else LbrError(type(error).__name__)
            )
            first = self._tell(found.exit_code, f"rank {self.world.rank}: {found}")
            _note(str(found))
            found.reported = found.reported or not first
            self._leave()
            if isinstance(error, Exception) and found is not error:
                raise found from error
        self._leave()

    def mark(self, step: int, doing: str) -> None:
        """The training thread is at optimizer step `step` (from 1) and about to do this."""
        self.step, self._doing = step, doing
        self._marks += 1
        self._woken.set()

    def own_seconds(self, step_seconds: float) -> float:
        """Mean seconds of the last steps in which this rank worked and did not wait for others.

        Told from looks at the training thread: exact over seconds, not within a step. Work that
        a GPU does behind that thread's back counts as whatever the thread does meanwhile.
        """
        looks, self._looks = self._looks, [0, 0]
        self._steps.append((looks[0], looks[1], step_seconds))
        work, wait, seconds = (sum(column) for column in zip(*self._steps, strict=True))
        return seconds / len(self._steps) * (work / (work + wait) if work + wait else 1.0)

    def pause(self) -> None:
        """What this rank has done since its last step was no step's work."""
        self._looks = [0, 0]

    def _look(self) -> None:
        last = time.monotonic()
        while not self._done.wait(_LOOK):
            now = time.monotonic()
            self._ran += min(now - last, _STOPPED)
            last = now
            self._looks[_waits(sys._current_frames().get(self._watched))] += 1
            if self.world.store is not None:
                self._lost_store |= self._ran - self._heard > min(_SILENT, self.limit)
            self._judge()

    def _talk(self) -> None:
        due, period = 0.0, _BEAT * max(1.0, self.world.size / _RANKS)
        while not self._done.is_set():
            marked = self._woken.wait(_LOOK)
            self._woken.clear()
            try:
                if marked or time.monotonic() >= due:
                    self._publish()
                if time.monotonic() >= due:
                    due = time.monotonic() + period
                    self._read()
                    self._heard = self._ran
            except Exception:  # the store's errors have many types; all mean that its host is gone
                self._lost_store = True
                return

    def _publish(self) -> None:
        self._count += 1
        frame = sys._current_frames().get(self._watched)
        beat = Beat(
            self._count, self._marks, self.step, self._doing, _waits(frame), socket.gethostname()
        )
        self.world.store.set(str(self.world.rank), json.dumps(beat))

    def _read(self) -> None:
        """Everybody's beats, and anybody's last words."""
        store, keys = self.world.store, [str(rank) for rank in range(self.world.size)]
        now, seen = self._ran, dict(self._seen)
        for rank, text in enumerate(store.multi_get(keys) if store.check(keys) else ()):
            beat = Beat(*json.loads(text))
            known = seen.get(rank)
            if known is None or known.beat.number != beat.number:
                seen[rank] = _Seen(beat, now)
        self._seen = seen  # whole, for the other threads
        if self.words is None and store.check(["last"]):
            code, line, teller = json.loads(store.get("last"))
            if teller != self.world.rank:
                # Before the teller goes: then a collective breaks, and there is nothing to see.
                _note(line, stacks=code == LostRank.exit_code)
                self.words = (code, line)
                store.set(f"read-{self.world.rank}", "")

    def _judge(self) -> None:
        """End this process if it must not go on."""
        if self._done.is_set():
            return
        if self.words is not None or self._lost_store:
            self._wait_for_the_rank()
            code, line = self.words or (LostRank.exit_code, self._lost_host())
            self._end(code, line, tell=self.words is None)
        if silent := self._silent(min(_SILENT, self.limit)):
            self._end(LostRank.exit_code, silent)
        marks = sum(seen.beat.marks for seen in self._seen.values()) or self._marks
        if marks != self._progress[0]:
            self._progress = (marks, self._ran)
        elif self._ran - self._progress[1] > self.limit:
            self._end(LostRank.exit_code, self._stuck())

    def _silent(self, seconds: float) -> str:
        """The line that names the ranks without a beat for so long, or ""."""
        gone = [rank for rank, seen in self._seen.items() if self._ran - seen.at > seconds]
        if not gone or self.world.rank in gone:
            return ""
        missing = "; ".join(f"rank {rank} is gone: {self._seen[rank].beat}" for rank in gone[:4])
        return f"{missing}{_STANDS}"

    def _stuck(self) -> str:
        """The line that names the rank furthest behind; of equals one that waits for nobody."""
        own = Beat(0, self._marks, self.step, self._doing, False, socket.gethostname())
        beats = {rank: seen.beat for rank, seen in self._seen.items()} or {self.world.rank: own}
        rank = min(beats, key=lambda r: (beats[r].marks, beats[r].waits, r))
        return (
            f"no rank got anywhere for {self.limit / 60:g} minutes (engine.timeout_minutes); rank "
            f"{rank} is furthest behind: {beats[rank]}. What each rank did stands in "
            f"log/rank-N.log{_STANDS}"
        )

    def _lost_host(self) -> str:
        host = self._seen.get(0)
        where = f": {host.beat}" if host else ""
        return f"rank 0 is gone{where}, or the launcher that ran it{_STANDS}"

    def _blame(self, error: BaseException) -> LbrError:
        """The error that stands for a broken collective; waits some beats to see who is missing."""
        deadline = time.monotonic() + 2 * _PATIENCE
        line = ""
        while time.monotonic() < deadline and not line:
            time.sleep(_LOOK)
            if self.words is not None:
                return PeerFailed(self.words[1], self.words[0])
            line = self._lost_host() if self._lost_store else self._silent(_MISSED * _BEAT)
        reason = short(error)
        found = LostRank(line or f"a collective failed: {reason}{_STANDS}")
        found.reported = not self._tell(found.exit_code, str(found))
        _note(f"{found} ({reason})")
        return found

    def _tell(self, code: int, line: str) -> bool:
        """Leave last words for the others; whether they are the first."""
        store = self.world.store
        if store is None or self._lost_store:
            return True
        mine = json.dumps([code, line, self.world.rank])
        try:
            if store.compare_set("last", "", mine).decode() != mine:
                return False
            # This process may host the store: the others must have read before it goes.
            deadline = time.monotonic() + _PATIENCE
            while time.monotonic() < deadline and not store.check(self._listeners()):
                time.sleep(_LOOK)
        except Exception:  # its host is gone, and with it the others' way to know
            pass
        return True

    def _listeners(self) -> list[str]:
        """The keys by which the ranks that still beat say that they have read the last words."""
        return [
            f"read-{rank}"
            for rank, seen in self._seen.items()
            if rank != self.world.rank and self._ran - seen.at <= _MISSED * _BEAT
        ]

    def _wait_for_the_rank(self) -> None:
        """The training thread may be about to end with an error of its own."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not self._done.is_set():
            time.sleep(_LOOK)

    def _end(self, code: int, line: str, *, tell: bool = True) -> None:
        """End this process from the watch's thread; the training thread is stuck."""
        if self._done.is_set():
            return
        if tell:
            _note(line, stacks=True)
        if tell and self._tell(code, line):
            print("lbr-ds: error:", mask_secrets(line), file=sys.stderr, flush=True)
        end(code)
        os._exit(code)

    def _leave(self) -> None:
        self._done.set()
        self._woken.set()


_STANDS = "; the last checkpoint stands"


def _note(line: str, *, stacks: bool = False) -> None:
    """Into the rank's own log file; the terminal has the line once, from whoever is at fault."""
    for handler in logging.getLogger("lbr_ds").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            with contextlib.suppress(OSError, ValueError):  # its disk may be what is at fault
                handler.stream.write(f"{mask_secrets(line)}\n")
                handler.flush()
                if stacks:
                    faulthandler.dump_traceback(handler.stream)


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread stands in a collective, by the innermost Python frames."""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/distributed/" in name or "/deepspeed/comm/" in name:
            return True
        if "/deepspeed/" in name and frame.f_code.co_name == "wait":
            return True
        frame = frame.f_back
    return False


def stragglers(own_seconds: list[float]) -> dict[str, float | list[float]]:
    """The ranks' own seconds of a step, and how far the slowest is behind.

    straggler: the fastest rank's seconds / the slowest one's; 1 when all are alike. Below 0.7, by
    a tenth of a second or more, the slowest is worth a look (its data, its processor, its node).
    """
    slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    score = min(own_seconds) / own_seconds[slowest] if own_seconds[slowest] else 1.0
    return {"rank_seconds": own_seconds, "straggler": score, "slowest_rank": slowest}


def last_seen(store: Any, rank: int) -> str:
    """Where a rank stood at its last beat, for a launcher; "" when it never had one."""
    return str(Beat(*json.loads(store.get(str(rank))))) if store.check([str(rank)]) else ""


def tell_all(store: Any, code: int, line: str) -> None:
    """A launcher's last words for a rank that could leave none."""
    store.compare_set("last", "", json.dumps([code, line, -1]))
