"""What can go wrong by a user's hand. The command line prints the one line and exits non-zero.

Each class has an exit code of its own, so that a job script can tell a hopeless error (a recipe
that can never work) from one that another try may cure (a lost node). The table stands in
slurm/README.md.
"""

from __future__ import annotations


class LbrError(Exception):
    """Root of all errors that are the user's to mend: the message names the place and the cure."""

    exit_code = 1
    told = False  # another process has printed the line already


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
    """Training that another try would not cure: updates left out, restarts without progress."""

    exit_code = 5


class EnvironmentProblem(LbrError):
    """Something that this machine lacks: a package, a device, disk space, SLURM."""

    exit_code = 6


class LostRank(LbrError):
    """A rank that was killed or hangs. The last checkpoint stands: another try may go on."""

    exit_code = 86


class PeerFailed(LbrError):
    """This rank ends because another one did, with that one's exit code; that one told why."""

    def __init__(self, message: str, exit_code: int, told: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.told = exit_code, told
