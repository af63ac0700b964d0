"""Errors that a user can cause or repair. The command line prints them as one line.

Each class has its own exit code, so that a job script can tell a permanent error (a recipe that can
never work) from one that another attempt may solve (a lost node). slurm/README.md has the table.
"""

from __future__ import annotations

import reprlib
from pathlib import PurePath

SAVED_AND_STOPPED = 85  # exit code of training that a signal ended: the same command resumes it


class LbrError(Exception):
    """Base of all errors that a user can repair: the message names the place and the cure."""

    exit_code = 1
    reported = False  # whether another process has printed the line already


class ConfigError(LbrError):
    """A recipe, an override or a ds_config cannot work."""

    exit_code = 2


class DataError(LbrError):
    """A record, a corpus, a shard or a manifest is not valid."""

    exit_code = 3


class CheckpointError(LbrError):
    """A checkpoint is missing or damaged, or was made with other settings."""

    exit_code = 4


class TrainingError(LbrError):
    """Training failed in a way that another attempt would repeat: too many skipped updates."""

    exit_code = 5


class EnvironmentProblem(LbrError):
    """This machine lacks something: a package, a device, disk space, SLURM."""

    exit_code = 6


class Unreachable(EnvironmentProblem):
    """A server did not send what was requested, several times; a later attempt may succeed."""


class LostRank(LbrError):
    """A rank was killed or hangs. The last checkpoint is intact; another attempt may succeed."""

    exit_code = 86


class InternalError(LbrError):
    """An unexpected error: a bug of this program, not of its input."""


class PeerFailed(LbrError):
    """This rank ends because another one did, which has reported the reason.

    Args:
        message: the reason.
        exit_code: the exit code of the other rank.
        reported: whether the reason has been printed.
    """

    def __init__(self, message: str, exit_code: int, reported: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.reported = exit_code, reported


def short(value: object, limit: int = 200) -> str:
    """Return `value` as one line of at most `limit` characters, for an error message.

    Only the beginning of a long value is read, so a value of any size costs little.
    """
    plain = isinstance(value, (str, BaseException, PurePath))
    text = str(value) if plain else _bounded_repr(value)
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit and len(text) <= 4 * limit else line[: limit - 3] + "..."


def _bounded_repr(value: object) -> str:
    """Return `repr(value)` with only the first few inner values."""
    shorter = reprlib.Repr()
    shorter.maxstring = shorter.maxother = shorter.maxlong = 120
    shorter.maxlist = shorter.maxtuple = shorter.maxdict = 6
    shorter.maxlevel = 3
    try:
        return shorter.repr(value)
    except ValueError:  # Python refuses to write an integer of more than 4300 digits
        return f"a value of type {type(value).__name__}"
