"""End the whole job soon, and name the rank at fault, when a rank dies or hangs.

Each rank's watch publishes heartbeats in the store where the ranks met: the step the rank is in and
what it is doing. It reads the heartbeats of the other ranks and ends this process when

- another rank has reported a failure, with the exit code of that report;
- another rank has stopped sending heartbeats: its process or node is gone, or is suspended;
- no rank has made progress for `engine.timeout_minutes`; the rank furthest behind is named.

A rank makes progress when it marks a new part of a step, and when it reads or writes files: at the
start, or to save a checkpoint, one file may take longer than the limit.

A collective that fails because a peer is gone is reported with the same line. Only one process
prints the line; the others write it to their logs. The training thread only assigns a few values
at each mark. One thread exchanges heartbeats and another one checks them, because a store whose
host was cut off neither answers nor fails.
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

from lbr_ds.distributed import World, end, is_collective_error
from lbr_ds.errors import LbrError, LostRank, PeerFailed, short
from lbr_ds.system.failures import as_lbr_error
from lbr_ds.system.io_progress import bytes_moved
from lbr_ds.system.masking import mask_secrets
from lbr_ds.training.heartbeat import Heartbeat

_POLL_SECONDS = 0.05  # between two samples of what the training thread does
_SUSPENDED_SECONDS = 1.0  # of a longer gap between two samples only this much counts
_HEARTBEAT_SECONDS = 1.0  # between two heartbeats, for up to _RANKS ranks; more in proportion
_RANKS = 64
_MISSED = 3.5  # heartbeats that a rank may miss when a collective has failed before it is blamed
_SILENT_SECONDS = 120.0  # without a heartbeat; a thread may wait that long for a large pickle
_PATIENCE_SECONDS = 5.0  # that the training thread has to end by itself after a peer's failure
_STEPS = 20  # the seconds of a rank's own work are averaged over so many steps
_KEPT = "; the last checkpoint is kept"
SAVES = "saves"  # what a rank does while it copies its state or waits for a checkpoint
WRITER = "checkpoint"  # name of the thread that writes a checkpoint


@dataclass
class _Seen:
    """A rank's newest heartbeat, and when it came, in seconds that this process has run."""

    heartbeat: Heartbeat
    at: float


class Watch:
    """Context manager around a stage; the training thread calls `mark` as it makes progress.

    On leaving with an error, that error is reported to the other ranks. A collective's error is
    replaced by LostRank or PeerFailed.
    """

    def __init__(self, world: World, minutes: float) -> None:
        self.world, self.limit = world, 60 * minutes
        self.peer_failure: tuple[int, str] | None = None  # exit code and line
        self.step, self._doing, self._marks, self._count = 0, "starts", 0, 0
        self._samples = [0, 0]  # of the training thread: at work, and waiting for others
        self._steps = deque[tuple[int, int, float]](maxlen=_STEPS)
        self._seen: dict[int, _Seen] = {}
        self._ran = 0.0  # seconds, without those in which this process was suspended
        self._progress = (-1, 0.0)  # marks and bytes of all ranks, and since when
        self._lost_store = False
        self._answered = 0.0  # when the store has last answered, by the clock of `_ran`
        self._watched = threading.get_ident()
        self._woken, self._done = threading.Event(), threading.Event()

    def __enter__(self) -> Watch:
        for work in (self._observe, self._exchange) if self.world.store else (self._observe,):
            threading.Thread(target=work, name="watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and is_collective_error(error):
            failure = self._explain(error)
            self._stop()
            raise failure from error
        if error is not None:
            plain = isinstance(error, Exception)
            failure = as_lbr_error(error) if plain else LbrError(type(error).__name__)
            first = self._report(failure.exit_code, f"rank {self.world.rank}: {failure}")
            _write_log(str(failure))
            failure.reported = failure.reported or not first
            self._stop()
            if plain and failure is not error:
                raise failure from error
        self._stop()

    def mark(self, step: int, doing: str) -> None:
        """Note that the training thread is at optimizer step `step` (from 1), about to do this."""
        self.step, self._doing = step, doing
        self._marks += 1
        self._woken.set()

    def own_seconds(self, step_seconds: float) -> float:
        """Return the mean seconds of the last steps in which this rank did not wait for others.

        It is estimated by sampling the training thread: exact over seconds, not within a step. Work
        that a GPU does in the background counts as whatever the thread does meanwhile.
        """
        samples, self._samples = self._samples, [0, 0]
        self._steps.append((samples[0], samples[1], step_seconds))
        work, wait, seconds = (sum(column) for column in zip(*self._steps, strict=True))
        return seconds / len(self._steps) * (work / (work + wait) if work + wait else 1.0)

    def pause(self) -> None:
        """Discard the samples since the last step: this time was not part of a step."""
        self._samples = [0, 0]

    def _observe(self) -> None:
        """Thread: sample the training thread and check all ranks."""
        last = time.monotonic()
        while not self._done.wait(_POLL_SECONDS):
            now = time.monotonic()
            self._ran += min(now - last, _SUSPENDED_SECONDS)
            last = now
            self._samples[_waits(sys._current_frames().get(self._watched))] += 1
            if self.world.store is not None:
                silence = self._ran - self._answered
                self._lost_store |= silence > min(_SILENT_SECONDS, self.limit)
            self._check()

    def _exchange(self) -> None:
        """Thread: publish this rank's heartbeats and read those of the others."""
        due, slower = 0.0, max(1.0, self.world.size / _RANKS)
        while not self._done.is_set():
            marked = self._woken.wait(_POLL_SECONDS)
            self._woken.clear()
            try:
                if marked or time.monotonic() >= due:
                    self._publish()
                if time.monotonic() >= due:
                    self._read()
                    self._answered = self._ran
                    gap = _HEARTBEAT_SECONDS if self._seen else _POLL_SECONDS  # a rank may die soon
                    due = time.monotonic() + gap * slower
            except Exception:  # the store's errors have many types; all mean that its host is gone
                self._lost_store = True
                return

    def _heartbeat(self, number: int, *, waits: bool) -> Heartbeat:
        now = (self._marks, self.step, self._doing, waits, socket.gethostname(), self._moved())
        return Heartbeat(number, *now)

    def _moved(self) -> int:
        """Return the bytes that were read and written for the training, for data or a checkpoint.

        While a rank saves, its training thread asks the other ranks again and again whether they
        have ended. That is no progress, so only the threads that write are counted then.
        """
        trainer = None if self._doing == SAVES else self._watched
        threads = [t for t in threading.enumerate() if t.name == WRITER or t.ident == trainer]
        return sum(map(bytes_moved, threads))

    def _publish(self) -> None:
        self._count += 1
        waits = _waits(sys._current_frames().get(self._watched))
        heartbeat = self._heartbeat(self._count, waits=waits)
        self.world.store.set(str(self.world.rank), json.dumps(heartbeat))

    def _read(self) -> None:
        """Read the heartbeats of all ranks, and a failure that one of them has reported."""
        store, keys = self.world.store, [str(rank) for rank in range(self.world.size)]
        now, seen = self._ran, dict(self._seen)
        for rank, text in enumerate(store.multi_get(keys) if store.check(keys) else ()):
            heartbeat = Heartbeat(*json.loads(text))
            known = seen.get(rank)
            if known is None or known.heartbeat.number != heartbeat.number:
                seen[rank] = _Seen(heartbeat, now)
        self._seen = seen  # replaced as a whole, for the other threads
        if self.peer_failure is None and store.check(["failure"]):
            code, line, reporter = json.loads(store.get("failure"))
            if reporter != self.world.rank:
                # Before the reporter ends: then a collective fails, and its stack is gone.
                _write_log(line, stacks=code == LostRank.exit_code)
                self.peer_failure = (code, line)
                store.set(f"read-{self.world.rank}", "")

    def _check(self) -> None:
        """End this process if it cannot continue."""
        if self._done.is_set():
            return
        if self.peer_failure is not None or self._lost_store:
            self._wait_for_training_thread()
            code, line = self.peer_failure or (LostRank.exit_code, self._lost_host())
            self._end_process(code, line, report=self.peer_failure is None)
        if silent := self._silent_ranks(min(_SILENT_SECONDS, self.limit)):
            self._end_process(LostRank.exit_code, silent)
        heartbeats = [seen.heartbeat for seen in self._seen.values()]
        heartbeats = heartbeats or [self._heartbeat(0, waits=False)]
        progress = sum(heartbeat.marks + heartbeat.moved for heartbeat in heartbeats)
        if progress != self._progress[0]:
            self._progress = (progress, self._ran)
        elif self._ran - self._progress[1] > self.limit:
            self._end_process(LostRank.exit_code, self._no_progress())

    def _silent_ranks(self, seconds: float) -> str:
        """Return the line that names the ranks without a heartbeat for that long, or ""."""
        gone = [rank for rank, seen in self._seen.items() if self._ran - seen.at > seconds]
        if not gone or self.world.rank in gone:
            return ""
        named = (f"rank {rank} is gone: {self._seen[rank].heartbeat}" for rank in gone[:4])
        return "; ".join(named) + _KEPT

    def _no_progress(self) -> str:
        """Return the line that names the rank furthest behind; in a tie one that does not wait."""
        heartbeats = {rank: seen.heartbeat for rank, seen in self._seen.items()}
        heartbeats = heartbeats or {self.world.rank: self._heartbeat(0, waits=False)}
        rank = min(heartbeats, key=lambda r: (heartbeats[r].marks, heartbeats[r].waits, r))
        return (
            f"no rank made progress for {self.limit / 60:g} minutes (engine.timeout_minutes); rank "
            f"{rank} is furthest behind: {heartbeats[rank]}. The stack traces of each rank are in "
            f"log/rank-N.log{_KEPT}"
        )

    def _lost_host(self) -> str:
        host = self._seen.get(0)
        where = f": {host.heartbeat}" if host else ""
        return f"rank 0 is gone{where}, or the launcher that ran it{_KEPT}"

    def _explain(self, error: BaseException) -> LbrError:
        """Return the error to raise for a failed collective, after waiting to see who is gone."""
        deadline = time.monotonic() + 2 * _PATIENCE_SECONDS
        line = ""
        while time.monotonic() < deadline and not line:
            time.sleep(_POLL_SECONDS)
            if self.peer_failure is not None:
                return PeerFailed(self.peer_failure[1], self.peer_failure[0])
            silent = self._silent_ranks(_MISSED * _HEARTBEAT_SECONDS)
            line = self._lost_host() if self._lost_store else silent
        reason = short(error)
        failure = LostRank(line or f"a collective failed: {reason}{_KEPT}")
        failure.reported = not self._report(failure.exit_code, str(failure))
        _write_log(f"{failure} ({reason})")
        return failure

    def _report(self, code: int, line: str) -> bool:
        """Report a failure to the other ranks; return whether it is the first one."""
        store = self.world.store
        if store is None or self._lost_store:
            return True
        mine = json.dumps([code, line, self.world.rank])
        try:
            if store.compare_set("failure", "", mine).decode() != mine:
                return False
            # This process may host the store: the others must have read before it ends.
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < deadline and not store.check(self._read_keys()):
                time.sleep(_POLL_SECONDS)
        except Exception:  # its host is gone, so the others cannot be reached
            pass
        return True

    def _read_keys(self) -> list[str]:
        """Return the keys that the other living ranks set when they have read a failure."""
        return [
            f"read-{rank}"
            for rank, seen in self._seen.items()
            if rank != self.world.rank and self._ran - seen.at <= _MISSED * _HEARTBEAT_SECONDS
        ]

    def _wait_for_training_thread(self) -> None:
        """Wait a little: the training thread may be about to end with an error of its own."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and not self._done.is_set():
            time.sleep(_POLL_SECONDS)

    def _end_process(self, code: int, line: str, *, report: bool = True) -> None:
        """End this process from the watch's thread; the training thread is stuck."""
        if self._done.is_set():
            return
        if report:
            _write_log(line, stacks=True)
        if report and self._report(code, line):
            print("lbr-ds: error:", mask_secrets(line), file=sys.stderr, flush=True)
        end(code)
        os._exit(code)

    def _stop(self) -> None:
        self._done.set()
        self._woken.set()


def _write_log(line: str, *, stacks: bool = False) -> None:
    """Write to the rank's own log file only: the rank at fault prints the line on the terminal."""
    for handler in logging.getLogger("lbr_ds").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            with contextlib.suppress(OSError, ValueError):  # its disk may be what is at fault
                handler.stream.write(f"{mask_secrets(line)}\n")
                handler.flush()
                if stacks:
                    faulthandler.dump_traceback(handler.stream)


def _waits(frame: FrameType | None) -> bool:
    """Return whether a thread is in a collective, by its innermost Python frames."""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/distributed/" in name or "/deepspeed/comm/" in name:
            return True
        ours = name.endswith("/lbr_ds/distributed.py")  # there torch's handle is waited for
        if ("/deepspeed/" in name or ours) and frame.f_code.co_name == "wait":
            return True
        frame = frame.f_back
    return False


def stragglers(own_seconds: list[float]) -> dict[str, float | list[float]]:
    """Return the ranks' own seconds of a step, and how far the slowest rank is behind.

    `straggler` is the fastest rank's seconds / the slowest rank's, 1 when all are equal. Below 0.7,
    with a difference of at least 0.1 s, check the slowest rank's data, processor and node.
    """
    slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    score = min(own_seconds) / own_seconds[slowest] if own_seconds[slowest] else 1.0
    return {"rank_seconds": own_seconds, "straggler": score, "slowest_rank": slowest}
