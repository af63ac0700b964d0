"""The command line: one file and one function per verb. Heavy imports happen inside the verbs.

`main` runs a verb and turns any exception into one line and an exit code (README.md lists them).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

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
    merge,
    mine,
    plan,
    prepare,
    push,
    report,
    reproduce,
    synthesize,
    train,
)
from lbr_ds.cli.app import app
from lbr_ds.errors import ConfigError, LostRank, short
from lbr_ds.system import children
from lbr_ds.system.failures import as_lbr_error
from lbr_ds.system.masking import mask_record, mask_secrets
from lbr_ds.system.report_once import report_once
from lbr_ds.system.urls import expand_home

__all__ = ["app", "main", "run"]

_OUTPUT_CLOSED = 128 + signal.SIGPIPE  # as in shells, for a program that the signal ends
_LINE = 2000  # characters of an error at most

_VERBS: dict[str, Callable[..., None]] = {  # in the order of `lbr-ds --help`
    "demo": demo.demo,
    "init": init.init,
    "config": config.config,
    "prepare": prepare.prepare,
    "synthesize": synthesize.synthesize,
    "mine": mine.mine,
    "train": train.train,
    "eval": eval.evaluate,
    "export": export.export,
    "merge": merge.merge,
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
    """Run a verb and exit; an error is one line on stderr, and its class decides the exit code."""
    children.follow_starter()
    _set_up_logging()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # lost ranks are reported by us
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars are noise in a log file
    code = run(sys.argv[1:])
    if "lbr_ds.distributed" in sys.modules:
        from lbr_ds.distributed import end

        end(code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the verb of a command line and return its exit code.

    Any exception becomes one line on stderr. LBR_TRACEBACK=1 also prints the traceback.
    """
    try:
        return _run_verb(arguments)
    except Exception as error:
        if isinstance(error, OSError) and (output_error := _output_error()):
            if isinstance(output_error, BrokenPipeError):
                return _OUTPUT_CLOSED
            error = output_error
        if os.environ.get("LBR_TRACEBACK") == "1":
            sys.stderr.write(mask_secrets("".join(traceback.format_exception(error))))
        if isinstance(error, RuntimeError) and _lost_peer(error):
            error = LostRank(
                "another rank ended unexpectedly; see the error of that rank (for training, "
                "RUN/stageN/log/rank-N.log)"
            )
        lbr_error = as_lbr_error(error)
        if not lbr_error.reported:
            _print_once(str(lbr_error))
        return lbr_error.exit_code


def _run_verb(arguments: list[str]) -> int:
    """Return the verb's exit code, however typer ends the program."""
    try:
        code = app([_expand_argument(word) for word in arguments], "lbr-ds", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except SystemExit as error:  # how typer ends when its output is closed
        if isinstance(error.__context__, BrokenPipeError):
            return _OUTPUT_CLOSED
        raise
    except TyperException as error:
        _print_error(f"{getattr(error, 'format_message', error.__str__)()} (see lbr-ds --help)")
        return ConfigError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _expand_argument(word: str) -> str:
    """Replace `~` by the home folder at the start of an argument and, unlike shells, after `=`."""
    name, equals, value = word.partition("=")
    try:
        return name + equals + expand_home(value) if equals else expand_home(word)
    except ValueError as error:
        raise ConfigError(f"{word}: {error}; write the path out") from None


def _output_error() -> OSError | None:
    """Return why standard output cannot be written: closed, as by `| head`, or a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        with contextlib.suppress(OSError, ValueError):  # discard what is still in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective operation failed because another rank ended."""
    if "lbr_ds.distributed" not in sys.modules:
        return False
    from lbr_ds.distributed import is_collective_error

    return is_collective_error(error)


def _print_once(message: str) -> None:
    """Print an error; of the ranks of one machine that have not joined yet, only one does so."""
    several = False
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ:
        from lbr_ds.distributed import has_joined, launched_ranks

        several = launched_ranks() > 1 and not has_joined()
    if several:
        report_once(message, lambda: _print_error(message))
    else:
        _print_error(message)


def _print_error(message: str) -> None:
    """Print a message as one line on stderr."""
    line = mask_secrets(short(message, _LINE))
    with contextlib.suppress(OSError):  # nobody reads standard error either
        print("lbr-ds: error:", line, file=sys.stderr, flush=True)


def _set_up_logging() -> None:
    """Send our log to stderr (each rank also writes a file); libraries only log warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    own = logging.getLogger("lbr_ds")
    own.setLevel(logging.INFO)
    own.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(mask_record)
    own.addHandler(handler)
