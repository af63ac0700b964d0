"""What can go wrong by a user's hand. The command line prints the one line and exits non-zero.

Each class has an exit code of its own, so that a job script can tell a hopeless error (a recipe
that can never work) from one that another try may cure (a lost node). The table stands in
slurm/README.md.
"""

from __future__ import annotations

import reprlib
from pathlib import PurePath


def short(value: object, limit: int = 200) -> str:
    """Return `value` as one line of at most `limit` characters, for an error message.

    Only the beginning of a longer value is looked at, so a value of any size costs little.
    """
    plain = isinstance(value, (str, BaseException, PurePath))
    text = str(value) if plain else _bounded(value)
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 3] + "..."


def _bounded(value: object) -> str:
    """`repr`, without the inner values of a nested one beyond a few."""
    shorter = reprlib.Repr()
    shorter.maxstring = shorter.maxother = shorter.maxlong = 120
    shorter.maxlist = shorter.maxtuple = shorter.maxdict = 6
    shorter.maxlevel = 3
    try:
        return shorter.repr(value)
    except ValueError:  # Python refuses to write a whole number of more than 4300 digits
        return f"a value of type {type(value).__name__}"


SAVED_AND_STOPPED = 85  # exit code of training that a signal ended: the same command resumes it


class LbrError(Exception):
    """Root of all errors that are the user's to mend: the message names the place and the cure."""

    exit_code = 1
    reported = False  # whether another process has printed the line already


class ConfigError(LbrError):
    """A recipe, an override or a ds_config that cannot work."""

    exit_code = 2


class DataError(LbrError):
    """A record, a corpus, a shard or a manifest that is not what it must be."""

    exit_code = 3


class CheckpointError(LbrError):
    """A checkpoint that is missing, damaged or made by a run that differs."""

    exit_code = 4


class TrainingError(LbrError):
    """Training that another try would not cure: updates skipped, restarts without progress."""

    exit_code = 5


class EnvironmentProblem(LbrError):
    """Something that this machine lacks: a package, a device, disk space, SLURM."""

    exit_code = 6


class LostRank(LbrError):
    """A rank was killed or hangs. The last checkpoint is kept, so training can be resumed."""

    exit_code = 86


class InternalError(LbrError):
    """An error that nobody foresaw: a fault of this program and not of what it was given."""


class PeerFailed(LbrError):
    """This rank ends because another one did, with that one's exit code, which has reported why."""

    def __init__(self, message: str, exit_code: int, reported: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.reported = exit_code, reported
