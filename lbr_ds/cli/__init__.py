"""The command line: one verb, one function. Heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback

import typer
from typer.exceptions import TyperException

from lbr_ds.cli import (
    bench,
    config,
    demo,
    doctor,
    eval,
    export,
    init,
    mine,
    plan,
    prepare,
    push,
    report,
    reproduce,
    train,
)
from lbr_ds.cli.app import app
from lbr_ds.errors import ConfigError, LostRank, short
from lbr_ds.system import children
from lbr_ds.system.failures import as_lbr_error
from lbr_ds.system.urls import expand_home, mask_record, mask_secrets

__all__ = ["app", "main", "run"]

_READER_LEFT = 128 + signal.SIGPIPE  # as shells say it of programs that the signal ends
_LINE = 2000  # characters of an error at most

_VERBS = {  # in the order of `lbr-ds --help`
    "demo": demo.demo,
    "init": init.init,
    "config": config.config,
    "prepare": prepare.prepare,
    "mine": mine.mine,
    "train": train.train,
    "eval": eval.evaluate,
    "export": export.export,
    "push": push.push,
    "report": report.report,
    "reproduce": reproduce.reproduce,
    "plan": plan.plan,
    "doctor": doctor.doctor,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)
app.add_typer(bench.bench, name="bench")


def main() -> None:
    """Run a verb; a user's error is one line on stderr and its class's exit code."""
    children.follow_starter()
    _open_console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost peer gets one line, of ours
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars are noise in a log file
    code = run(sys.argv[1:])
    if "lbr_ds.distributed" in sys.modules:
        from lbr_ds.distributed import end

        end(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the verb of a command line; return its exit code.

    Whatever a verb raises becomes one line on stderr. LBR_TRACEBACK=1 shows the traceback too.
    """
    try:
        return _run_verb(arguments)
    except Exception as error:
        if isinstance(error, OSError) and (refused := _output_refused()):
            if isinstance(refused, BrokenPipeError):
                return _READER_LEFT
            error = refused
        if os.environ.get("LBR_TRACEBACK") == "1":
            sys.stderr.write(mask_secrets("".join(traceback.format_exception(error))))
        if isinstance(error, RuntimeError) and _lost_peer(error):
            error = LostRank(
                "another rank ended unexpectedly; see the error of that rank (for training, "
                "RUN/stageN/log/rank-N.log)"
            )
        found = as_lbr_error(error)
        if not found.reported:
            _complain(str(found))
        return found.exit_code


def _run_verb(arguments: list[str]) -> int:
    """The verb's exit code, with typer's own ways to end a program."""
    try:
        code = app([_expanded(word) for word in arguments], "lbr-ds", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except SystemExit as error:  # how typer ends when nobody reads what it writes
        if isinstance(error.__context__, BrokenPipeError):
            return _READER_LEFT
        raise
    except TyperException as error:
        # Typer's own faults have a form of their own (format_message).
        _complain(f"{getattr(error, 'format_message', error.__str__)()} (see lbr-ds --help)")
        return ConfigError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _expanded(word: str) -> str:
    """A word with the home folder for `~` at its start and, as shells do not, behind its `=`."""
    name, equals, value = word.partition("=")
    try:
        return name + equals + expand_home(value) if equals else expand_home(word)
    except ValueError as error:
        raise ConfigError(f"{word}: {error}; write the path out") from None


def _output_refused() -> OSError | None:
    """Why standard output takes no more (nobody reads it, as behind `| head`; a full disk)."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        with contextlib.suppress(OSError, ValueError):  # what is left in it goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed, in a verb that has joined other ranks."""
    if "lbr_ds.distributed" not in sys.modules:
        return False
    from lbr_ds.distributed import is_collective_error

    return is_collective_error(error)


def _complain(message: str) -> None:
    """One line, whatever the message was made of."""
    line = mask_secrets(short(message, _LINE))
    with contextlib.suppress(OSError):  # nobody reads standard error either
        print("lbr-ds: error:", line, file=sys.stderr, flush=True)


def _open_console() -> None:
    """Our own log speaks on stderr (each rank also writes a file); libraries only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    own = logging.getLogger("lbr_ds")
    own.setLevel(logging.INFO)
    own.propagate = False
    speaker = logging.StreamHandler(sys.stderr)
    speaker.addFilter(mask_record)
    own.addHandler(speaker)
