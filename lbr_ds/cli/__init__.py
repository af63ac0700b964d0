"""The command line: one verb, one function. Heavy imports happen inside the verbs."""

from __future__ import annotations

import logging
import os
import sys

import typer
from typer.exceptions import TyperException

from lbr_ds.address import mask_record, masked
from lbr_ds.cli import build, judge, measure
from lbr_ds.cli.app import app
from lbr_ds.errors import ConfigError, LbrError, LostRank

__all__ = ["app", "build", "judge", "main", "measure"]


def main() -> None:
    """Run a verb; a user's error is one line on stderr and its class's exit code."""
    _open_console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a lost peer gets one line, of ours
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars are noise in a log file
    code = _run()
    if "lbr_ds.distributed" in sys.modules:
        from lbr_ds.distributed import end

        end(code)
    sys.exit(code)


def _run() -> int:
    """The verb's exit code."""
    try:
        return int(app(prog_name="lbr-ds", standalone_mode=False) or 0)
    except TyperException as error:
        # Typer's own faults have a form of their own (format_message).
        _complain(f"{getattr(error, 'format_message', error.__str__)()} (see lbr-ds --help)")
        return ConfigError.exit_code
    except LbrError as error:
        if not error.told:
            _complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except RuntimeError as error:
        if not _lost_peer(error):
            raise
        _complain("another rank has ended; its own line says why")
        return LostRank.exit_code


def _lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed, in a verb that has joined other ranks."""
    if "lbr_ds.distributed" not in sys.modules:
        return False
    from lbr_ds.distributed import is_collective_error

    return is_collective_error(error)


def _complain(message: str) -> None:
    """One line, whatever the message was made of."""
    print("lbr-ds: error:", masked(" ".join(message.split())), file=sys.stderr, flush=True)


def _open_console() -> None:
    """Our own log speaks on stderr (each rank also writes a file); libraries only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    own = logging.getLogger("lbr_ds")
    own.setLevel(logging.INFO)
    own.propagate = False
    speaker = logging.StreamHandler(sys.stderr)
    speaker.addFilter(mask_record)
    own.addHandler(speaker)
