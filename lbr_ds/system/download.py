"""Download a file completely or not at all, with a bounded number of attempts.

`retry` repeats an action after a temporary failure, such as a broken connection or a busy server.
`download` fetches a file of unknown content: it compares the length with the one that the server
stated, resumes an interrupted transfer, and does not accept an error page as data.
Messages show URLs without user, password and query.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lbr_ds.errors import DataError, EnvironmentProblem, LbrError, Unreachable
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import http_request, public_url

log = logging.getLogger(__name__)
RETRY_WAITS = (0.5, 2.0, 8.0)  # seconds before each further attempt
TIMEOUT = 60  # seconds without a byte
CHUNK_BYTES = 1 << 20
_HEAD = 1024  # bytes by which a web page is recognised
_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".parquet": b"PAR1",
    ".zip": b"PK",
    ".whl": b"PK",
    ".xz": b"\xfd7zXZ",
    ".bz2": b"BZh",
    ".gguf": b"GGUF",
}
_PAGE = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)[\s>]", re.I | re.S
)
_Result = TypeVar("_Result")


class DamagedDownload(Exception):
    """The received data is not what was announced."""


def retry(where: str, action: Callable[[], _Result]) -> _Result:
    """Return `action()`, repeating it after temporary failures.

    Args:
        where: the place, for messages.
        action: performs one attempt.

    Raises:
        FileNotFoundError: there is no such file (also for HTTP 404 and 410).
        DamagedDownload: the last attempt received wrong data.
        Unreachable: any other failure.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return action()
        except (LbrError, FileNotFoundError):
            raise
        except Exception as error:  # each backend of fsspec raises its own
            if isinstance(error, urllib.error.HTTPError) and error.code in (404, 410):
                raise FileNotFoundError from None
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if wait is None and isinstance(error, DamagedDownload):
                raise
            reason = _failure(error)
            refused = isinstance(error, PermissionError) or reason in ("HTTP 401", "HTTP 403")
            if wait is None or refused:
                cure = "check its credentials" if refused else "check the network and the address"
                raise Unreachable(f"{where}: cannot be read ({reason}); {cure}") from None
        log.warning("%s: %s; trying again in %.1f s", where, reason, wait)
        time.sleep(wait)
    raise AssertionError


def _failure(error: BaseException) -> str:
    """Describe an error without its own text, which may contain a URL with secrets."""
    if isinstance(error, DamagedDownload):
        return str(error)
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _failure(error.reason)
    if isinstance(error, http.client.IncompleteRead):
        return "truncated"
    strerror = getattr(error, "strerror", None) if isinstance(error, OSError) else None
    return strerror or type(error).__name__


def open_http(url: str, headers: dict[str, str] | None = None) -> Any:
    """Return the response to a GET of `url`; its user and password are sent as Basic."""
    request = http_request(url)
    for name, value in (headers or {}).items():
        request.add_header(name, value)
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def download(url: str, part: Path) -> str:
    """Download a file into `part` and return its sha256 in hex.

    An interrupted transfer is resumed if the server supports that; otherwise it starts over.

    Raises:
        EnvironmentProblem: the file cannot be fetched completely.
        DataError: there is no such file, or the server sends a web page or another kind of file.
    """
    where, fetching = public_url(url), _Download(url, part)
    try:
        retry(where, fetching.attempt)
    except FileNotFoundError:
        raise DataError(f"{where}: the server has no such file; check the address") from None
    except DamagedDownload as error:
        raise EnvironmentProblem(
            f"{where}: cannot be downloaded completely ({error}); try again later"
        ) from None
    _check_kind(where, part, Path(urlsplit(url).path).suffix.lower())
    return fetching.digest.hexdigest()


class _Download:
    """A download in progress; `attempt` resumes from the bytes on disk."""

    def __init__(self, url: str, part: Path) -> None:
        self.url, self.part = url, part
        self._start_over()

    def _start_over(self) -> None:
        self.digest, self.count, self.version = hashlib.sha256(), 0, ""
        self.part.write_bytes(b"")

    def attempt(self) -> None:
        """Fetch what is missing. Raises DamagedDownload if the body ends too early."""
        headers = {}
        if self.count and self.version:
            headers = {"Range": f"bytes={self.count}-", "If-Range": self.version}
        with open_http(self.url, headers) as response:
            start, total = extent(response)
            if self.count and start != self.count:
                self._start_over()
            if start != self.count:
                raise DamagedDownload(f"begins at byte {start}")
            # A weak tag does not promise equal bytes.
            tag = response.headers.get("ETag") or ""
            self.version = tag if tag and not tag.startswith("W/") else ""
            name = f"download {Path(urlsplit(self.url).path).name} (MiB)"
            with self.part.open("ab") as target, show_progress() as progress:
                while piece := response.read(CHUNK_BYTES):
                    self.digest.update(piece)
                    self.count += len(piece)
                    target.write(piece)
                    progress(name, self.count >> 20, total and total >> 20)
        if total is not None and self.count != total:
            raise DamagedDownload(f"truncated, {self.count} bytes of {total}")
        if total is None and "chunked" not in (response.headers.get("Transfer-Encoding") or ""):
            log.warning(
                "%s: the server sent no Content-Length, so a truncated download cannot be "
                "detected; add #sha256=... to the address",
                public_url(self.url),
            )


def extent(response: Any) -> tuple[int, int | None]:
    """Return (first byte, length of the whole file or None) of a response."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
        return (int(found[1]), int(found[2])) if found else (-1, None)
    length = response.headers.get("Content-Length") or ""
    return 0, int(length) if length.isdigit() else None


def _check_kind(where: str, part: Path, suffix: str) -> None:
    """Raise DataError if a web page or another kind of file than the name says was received."""
    with part.open("rb") as file:
        head = file.read(_HEAD)
    if suffix not in (".html", ".htm", ".xhtml") and _PAGE.match(
        head.removeprefix(b"\xef\xbb\xbf")
    ):
        raise DataError(
            f"{where}: the server sent a web page (HTML), as those that report an error or ask for "
            "a login, and not the file; check the address"
        )
    if not head.startswith(_MAGIC.get(suffix, b"")):
        raise DataError(
            f"{where}: what the server sent is no {suffix} file (it begins with {head[:8]!r}); "
            "check the address"
        )
