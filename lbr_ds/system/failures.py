"""Turn any exception into an `LbrError`: one line that names the place and the cure, and a code.

Code that opens a file says what it is:

    with reading(path, "the model's config", CheckpointError):
        config = AutoConfig.from_pretrained(path)
    with writing(run_folder):
        ...

The command line and ranks use `as_lbr_error`, which makes a line of whatever is left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from lbr_ds.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentProblem,
    InternalError,
    LbrError,
    short,
)
from lbr_ds.system.masking import mask_secrets

_ROOM = "free some space there, or choose a place on another disk"
_PATH = "check the path"
# Reason and cure of an operating-system error. Those of _DISK concern the disk that is written.
_DISK = {
    errno.ENOSPC: ("no space is left on the disk", _ROOM),
    errno.EDQUOT: ("the disk quota is used up", _ROOM),
    errno.EFBIG: ("the file grows beyond the limit of this system", "raise it (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "choose a place that can be written"),
    errno.EIO: ("the disk reports an input/output error", "check it, or use another disk"),
    errno.ESTALE: ("the network file system no longer has it", "mount it again"),
}
_SYSTEM = {
    **_DISK,
    errno.EACCES: ("permission denied", "change its permissions, or choose another place"),
    errno.EPERM: ("not permitted", "change its permissions, or choose another place"),
    errno.ENOENT: ("no such file or folder", _PATH),
    errno.ENOTDIR: ("a part of the path is a file and not a folder", _PATH),
    errno.EISDIR: ("is a folder where a file is expected", "give the path of a file"),
    errno.EEXIST: ("exists already", "choose another place, or move it away"),
    errno.ENOTEMPTY: ("the folder is not empty", "choose another place, or move its files away"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links form a loop", "remove one of them"),
    errno.EBUSY: ("in use by another program, or a mount point", "choose another place"),
    errno.EXDEV: ("source and target are on different disks", "choose a place on the same one"),
    errno.EINVAL: ("the system does not accept this path or operation", _PATH),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "close other programs"),
    errno.ENOMEM: ("not enough memory", "close other programs, or use a larger machine"),
    errno.EAGAIN: ("no more processes or memory may be used", "raise the limit (ulimit -u)"),
}
_OS_ERROR = re.compile(r"\bos error (\d+)\b")  # as in messages of libraries written in Rust
_SQLITE = {
    "full": errno.ENOSPC,
    "readonly": errno.EROFS,
    "disk i/o": errno.EIO,
    "unable to open": errno.EACCES,
}
# Errors of libraries by the module of their class, where no `reading` names the file.
_LIBRARIES: dict[str, tuple[type[LbrError], str]] = {
    "safetensors": (CheckpointError, "a weights file cannot be read; copy or save it again"),
    "safetensors_rust": (CheckpointError, "a weights file cannot be read; copy or save it again"),
    "numpy.linalg": (CheckpointError, "the model's vectors are not usable; check its weights"),
    "huggingface_hub": (
        EnvironmentProblem,
        "the hub refused it; check the name and the network",
    ),
    "httpx": (EnvironmentProblem, "the network or the server failed; try again later"),
    "requests": (EnvironmentProblem, "the network or the server failed; try again later"),
    "aiohttp": (EnvironmentProblem, "the network or the server failed; try again later"),
    "urllib": (EnvironmentProblem, "the network or the server failed; try again later"),
    "socket": (EnvironmentProblem, "the network or the server failed; try again later"),
    "http": (EnvironmentProblem, "the network or the server failed; try again later"),
    "pyarrow": (DataError, "a Parquet or Arrow file cannot be read; fetch or make it again"),
    "zipfile": (DataError, "a zip file or wheel cannot be read; fetch it again"),
    "tarfile": (DataError, "a tar file cannot be read; fetch it again"),
    "gzip": (DataError, "a compressed file cannot be read; fetch it again"),
    "zlib": (DataError, "a compressed file cannot be read; fetch it again"),
    "_lzma": (DataError, "a compressed file cannot be read; fetch it again"),
    "json": (DataError, "a file is not JSON; make it again"),
    "yaml": (ConfigError, "a file is not YAML; correct it"),
    "sqlite3": (EnvironmentProblem, "the work file cannot be used; check the disk"),
    "_duckdb": (EnvironmentProblem, "the work file cannot be used; check the disk"),
}
_BUILT_IN: dict[type[BaseException], tuple[type[LbrError], str]] = {
    EOFError: (DataError, "a file ends too early; fetch or copy it again"),
    UnicodeEncodeError: (
        EnvironmentProblem,
        "the terminal cannot show some characters; set PYTHONIOENCODING=utf-8",
    ),
    UnicodeError: (DataError, "text cannot be decoded; convert the file to UTF-8"),
}
_OUT_OF_MEMORY = ("OutOfMemoryError", "OutOfMemoryException")  # torch's and DuckDB's
_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.I)


@contextlib.contextmanager
def reading(
    place: str | Path, what: str, kind: type[LbrError] = DataError, cure: str = ""
) -> Iterator[None]:
    """Raise `kind` instead of any error inside the block, naming `place`.

    For code that opens a foreign file with any library: its content may make it fail in any way.

    Args:
        place: the file or folder, or the key of the recipe that names it.
        what: what is read there, as "the config".
        kind: the class of the error to raise.
        cure: what to do about content that cannot be read.
    """
    try:
        yield
    except LbrError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        found = _from_os_error(error, place, kind)
        if found is None:
            why = short(error) or type(error).__name__
            found = kind(
                f"{short(place)}: {what} cannot be read ({why}); {cure or 'make or copy it again'}"
            )
        raise found from error


@contextlib.contextmanager
def writing(place: str | Path, kind: type[LbrError] = EnvironmentProblem) -> Iterator[None]:
    """Raise `kind` instead of operating-system errors inside the block.

    Args:
        place: what to name if the error does not say which file it is about (a disk that fills up
            while a file is written, or a library that only passes on the reason).
        kind: the class of the error to raise.
    """
    try:
        yield
    except LbrError:
        raise
    except Exception as error:
        if (found := _from_os_error(error, place, kind)) is not None:
            raise found from error
        raise


def check_writable(path: Path) -> Path:
    """Return `path` if a file can be written in its folder, else raise EnvironmentProblem.

    For the start of long work whose result is stored at the end.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(1 << 12))
    return path


def as_lbr_error(error: BaseException) -> LbrError:
    """Return the `LbrError` for any exception: one line with a cure and an exit code.

    The traceback of an unexpected error is stored in a file, which the line names.
    """
    if isinstance(error, LbrError):
        return error
    if is_out_of_memory(error):
        return EnvironmentProblem(
            f"not enough memory ({short(error) or 'none left'}); in training, lower "
            "stageN.micro_batch_tokens, otherwise close other programs or use a machine with more "
            "memory"
        )
    return _from_os_error(error) or _from_library_error(error) or _unexpected(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether it is an error of Python, torch or DuckDB for lack of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ in _OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)[:2000]) is not None


def _from_os_error(
    error: BaseException, place: str | Path | None = None, kind: type[LbrError] = EnvironmentProblem
) -> LbrError | None:
    """Return the line for an operating-system error; None for any other error.

    Of an error that collects several (shutil.Error, for a whole folder) the first is reported.
    """
    number, file, text = _error_details(error)
    if number in _SYSTEM:
        reason, cure = _SYSTEM[number]
    elif isinstance(error, OSError) and place is None:
        reason, cure = text or type(error).__name__, "check the path, the disk and the network"
    else:
        return None
    if file is None and (number in _DISK or place is None or kind is not EnvironmentProblem):
        file = None if place is None else str(place)
    where = f"{short(file)}: " if file else ""
    return kind(f"{where}{reason}; {cure}")


def _error_details(error: BaseException) -> tuple[int | None, str | None, str]:
    """Return (errno, file, text) of an error, each as far as it is known."""
    text = short(error)
    if isinstance(error, OSError):
        several = error.args[0] if error.args else None
        if error.errno is None and isinstance(several, list) and several:  # shutil.Error
            _, target, text = several[0]
            number = re.search(r"Errno (\d+)", str(text))
            return (int(number[1]) if number else None), str(target), short(text)
        name = error.filename if isinstance(error.filename, (str, bytes, os.PathLike)) else None
        return error.errno, None if name is None else os.fsdecode(name), error.strerror or text
    if found := _OS_ERROR.search(str(error)[:4000]):
        return int(found[1]), None, text
    if type(error).__module__ == "_duckdb":
        return next((n for n in _SYSTEM if os.strerror(n) in str(error)), None), None, text
    if type(error).__module__ == "sqlite3":
        return next((n for word, n in _SQLITE.items() if word in text.lower()), None), None, text
    return None, None, text


def _from_library_error(error: BaseException) -> LbrError | None:
    """Return the line for an error of a known library; None for any other error."""
    found = next((_BUILT_IN[c] for c in type(error).__mro__ if c in _BUILT_IN), None)
    for module in (c.__module__ for c in type(error).__mro__):
        parts = module.split(".")
        found = found or _LIBRARIES.get(".".join(parts[:2])) or _LIBRARIES.get(parts[0])
    if found is None:
        return None
    kind, line = found
    what, _, cure = line.partition("; ")
    return kind(
        f"{what} ({type(error).__name__}: {short(error)}, {_innermost_frame(error)}); {cure}"
    )


def _unexpected(error: BaseException) -> InternalError:
    """Return the line for a bug of this program; its traceback is stored in a file."""
    trace = mask_secrets("".join(traceback.format_exception(error)))
    kept = _save_traceback(trace)
    cure = f"with {kept}, which holds the traceback" if kept else "with what LBR_TRACEBACK=1 shows"
    return InternalError(
        f"unexpected error, probably a bug in lbr-ds ({type(error).__name__}: {short(error)}, "
        f"{_innermost_frame(error)}); please report it with the command and {cure}"
    )


def _innermost_frame(error: BaseException) -> str:
    """Return the innermost line of this package in the error's traceback."""
    package = str(Path(__file__).parent.parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(package) and f.filename != __file__]
    if not own:
        return "outside of lbr_ds"
    return f"at lbr_ds{own[-1].filename.removeprefix(package)}:{own[-1].lineno}"


def _save_traceback(trace: str) -> str | None:
    """Append a traceback to the open log file, or else to a new file. Return its path."""
    for handler in logging.getLogger("lbr_ds").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                handler.stream.write(trace)
                handler.flush()
                return handler.baseFilename
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", prefix="lbr-ds-traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
        return file.name
    return None
