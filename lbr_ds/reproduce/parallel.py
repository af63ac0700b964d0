"""Run several jobs of a table at once, each as `lbr-ds reproduce ... --only K`.

A job starts as soon as the jobs that it needs are done. Its output goes into a log file of its own;
lines of this process say which jobs run, are done and are left. A signal stops all jobs, and so
does the first one that fails; training then saves, and the same command resumes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lbr_ds.errors import SAVED_AND_STOPPED, LbrError, LostRank, short
from lbr_ds.reproduce.jobs import Job
from lbr_ds.system import children

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0  # for a job to save after it was asked to stop
STATUS_SECONDS = 30.0  # between two lines on the state of all jobs
_POLL_SECONDS = 0.1
# A step of training, or a line of progress (system/progress.py).
_REACHED = re.compile(r"(step \d+/\d+)|^(.+: [\d,]+ of [\d,]+ \(\d+ %\))", re.MULTILINE)
_ERROR = "lbr-ds: error: "


@dataclass(frozen=True)
class Numbered:
    """A job and its number in the list of jobs of the table."""

    number: int
    job: Job

    @property
    def name(self) -> str:
        """How log lines name it."""
        return f"job {self.number} ({self.job.folder.name})"


@dataclass
class Running:
    """A job that runs.

    Attributes:
        one: the job.
        slot: its place among the jobs at once, from 0; two running jobs never share one.
        process: `lbr-ds reproduce --only`.
        output: the file that it prints into.
        began: when it was started, by time.monotonic.
    """

    one: Numbered
    slot: int
    process: subprocess.Popen[bytes]
    output: Path
    began: float = field(default_factory=time.monotonic)

    def state(self) -> str:
        """Return its name and what it has reached, as its output says."""
        found = _REACHED.findall(_tail(self.output))
        return f"{self.one.name} {''.join(found[-1]) if found else 'starts'}"


def run_jobs(
    jobs: Sequence[Numbered],
    command: Sequence[str],
    *,
    at_once: int,
    environments: Sequence[Mapping[str, str]],
    logs: Path,
) -> None:
    """Run jobs until all are done.

    Args:
        jobs: what is missing, in the order in which jobs may start.
        command: what runs a job, to which `--only K` is added.
        at_once: number of jobs at a time.
        environments: variables of the jobs of each slot, such as its GPU.
        logs: folder of the jobs' outputs.

    Raises:
        LbrError: a job failed, or a signal stopped them; it names the job and its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, done = list(jobs), list[Running](), 0
    next_status = time.monotonic() + STATUS_SECONDS

    def counts() -> str:
        return f"{len(running)} running, {done} done, {len(waiting)} left"

    with children.forward_signals([]) as signals:  # the jobs get a SIGTERM, by which training saves
        try:
            while waiting or running:
                if signals:
                    raise _stopped(signals[0], running)
                for one in _ready(waiting, running)[: at_once - len(running)]:
                    waiting.remove(one)
                    running.append(_start(one, running, command, environments, logs))
                    log.info(
                        "%s: started, output in %s; %s", one.name, running[-1].output, counts()
                    )
                for ended in [job for job in running if job.process.poll() is not None]:
                    if ended.process.returncode and not signals:
                        raise _failure(ended)
                    running.remove(ended)
                    done += 1
                    seconds = time.monotonic() - ended.began
                    log.info("%s: done in %.0f s; %s", ended.one.name, seconds, counts())
                if time.monotonic() > next_status:
                    next_status = time.monotonic() + STATUS_SECONDS
                    log.info("%s: %s", counts(), ", ".join(job.state() for job in running))
                time.sleep(_POLL_SECONDS)
        finally:
            stop([job.process for job in running])


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop; after GRACE_SECONDS kill those that still run, and their children."""
    children.send_signals(processes, [signal.SIGTERM])
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(_POLL_SECONDS)
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each leads a session of its own
            process.wait()


def _ready(waiting: Sequence[Numbered], running: Sequence[Running]) -> list[Numbered]:
    """Return the waiting jobs that need none that waits or runs."""
    open_folders = {one.job.folder for one in [*waiting, *(r.one for r in running)]}
    return [one for one in waiting if not open_folders & {t.parent for _, t in one.job.links}]


def _start(
    one: Numbered,
    running: Sequence[Running],
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    logs: Path,
) -> Running:
    slot = min(set(range(len(running) + 1)) - {job.slot for job in running})
    output = logs / f"{one.job.folder.name}.log"
    words = [*command, "--only", str(one.number)]
    env = {**os.environ, **environments[slot]}
    with output.open("wb") as file:
        process = subprocess.Popen(
            words,
            env=children.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through this process only
        )
    return Running(one, slot, process, output)


def _failure(ended: Running) -> LbrError:
    """Return the error for a job that failed: its own line, and where its output is."""
    code = children.shell_exit_code(ended.process.returncode)
    lines = [line for line in _tail(ended.output).splitlines() if line.strip()]
    ours = [line.split(_ERROR, 1)[1] for line in lines if _ERROR in line]
    if code > 128:
        reason = f"killed by {signal.Signals(code - 128).name}"
    else:
        reason = short((ours or lines or ["nothing was printed"])[-1], 400)
    error: LbrError = LbrError() if code < 128 else LostRank()
    error.args = (
        f"{ended.one.name} failed, so the others were stopped: {reason} (exit code {code}; its "
        f"output is in {ended.output})",
    )
    error.exit_code = code if code < 128 else LostRank.exit_code
    return error


def _stopped(number: int, running: Sequence[Running]) -> LbrError:
    """Stop all jobs after a signal and return the error that says so."""
    processes = [job.process for job in running]
    stop(processes)
    saved = all(process.returncode in (0, SAVED_AND_STOPPED) for process in processes)
    names = ", ".join(job.one.name for job in running) or "no job"
    error = LbrError(
        f"stopped by {signal.Signals(number).name} at {names}; the same command resumes"
    )
    error.exit_code = SAVED_AND_STOPPED if saved else 128 + number
    return error


def _tail(path: Path, size: int = 1 << 14) -> str:
    """Return the end of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", "replace")
