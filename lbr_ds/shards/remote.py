"""A prepared folder behind a URL -> its files on this disk, checked.

`http://` and `https://` go through the standard library, every other scheme (`s3://`, `gs://`, ..)
through fsspec, whose backend must be installed; that finds its credentials by itself. Nothing here
ever starts a program, and messages show an address without user, password and query.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from lbr_ds.address import shown
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, LbrError
from lbr_ds.locate import cache_folder
from lbr_ds.shards import cache

log = logging.getLogger(__name__)
_WAITS = (0.5, 2.0, 8.0)  # seconds before each new try
_TIMEOUT = 60  # seconds without a byte
_PIECE = 1 << 20
_Found = TypeVar("_Found")


class _Damaged(Exception):
    """What came is not what the manifest says."""


@dataclass(frozen=True)
class Remote:
    """The folder at `url`; fetched shards may fill `cache_gib` GiB of this disk."""

    url: str
    cache_gib: float

    @property
    def place(self) -> str:
        """The URL for messages."""
        return shown(self.url)

    @property
    def folder(self) -> Path:
        """Where fetched shards are kept, whatever folder they are of."""
        return cache_folder() / "shards"

    def read(self, name: str) -> bytes | None:
        """A small file's bytes, None where there is none; tries again as `file` does."""

        def whole() -> bytes:
            with _open(self.url, name) as source:
                return source.read()

        try:
            return _insist(f"{self.place}/{name}", whole)
        except FileNotFoundError:
            return None

    def file(self, name: str, length: int, sha256: str) -> Path:
        """The cached file of this length and hash, fetched from `name` when it is not there.

        Raises DataError for a missing or altered file, EnvironmentProblem when the place cannot be
        reached after some tries, ConfigError when the cache is too small for it.
        """
        where = f"{self.place}/{name}"

        def fetch(part: Path) -> None:
            try:
                _insist(where, lambda: _copy(self.url, name, part, length, sha256))
            except FileNotFoundError:
                raise DataError(
                    f"{where}: the manifest names this shard and it is missing; copy it there"
                ) from None
            except _Damaged as error:
                raise DataError(f"{where}: {error}; copy the file there again") from None

        limit = int(self.cache_gib * 2**30)
        return cache.keep(self.folder, f"{sha256}.tar", length, limit, fetch)


def _copy(url: str, name: str, part: Path, length: int, sha256: str) -> None:
    digest, count = hashlib.sha256(), 0
    with _open(url, name) as source, part.open("r+b") as target:
        while piece := source.read(_PIECE):
            digest.update(piece)
            count += len(piece)
            if count > length:
                raise _Damaged(f"longer than the manifest's {length} bytes")
            target.write(piece)
    if count != length:
        raise _Damaged(f"truncated, {count} bytes and not the manifest's {length}")
    if digest.hexdigest() != sha256:
        found = digest.hexdigest()[:12]
        raise _Damaged(f"altered, sha256 {found}.. and not the manifest's {sha256[:12]}..")


def _insist(where: str, action: Callable[[], _Found]) -> _Found:
    """`action()`, tried again after what may pass: a broken line, a busy server, a damaged body.

    Raises FileNotFoundError and _Damaged as they are, EnvironmentProblem for all else.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except (LbrError, FileNotFoundError):
            raise
        except Exception as error:  # each backend of fsspec raises its own
            if isinstance(error, urllib.error.HTTPError) and error.code in (404, 410):
                raise FileNotFoundError from None
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            if wait is None and isinstance(error, _Damaged):
                raise
            reason = _reason(error)
            refused = isinstance(error, PermissionError) or reason in ("HTTP 401", "HTTP 403")
            if wait is None or refused:
                cure = "check its credentials" if refused else "check the network and the address"
                raise EnvironmentProblem(f"{where}: cannot be read ({reason}); {cure}") from None
        log.warning("%s: %s; trying again in %.1f s", where, reason, wait)
        time.sleep(wait)
    raise AssertionError


def _reason(error: BaseException) -> str:
    """What happened, without the text of others: that may hold an address with its secrets."""
    if isinstance(error, _Damaged):
        return str(error)
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, http.client.IncompleteRead):
        return "truncated"
    strerror = getattr(error, "strerror", None) if isinstance(error, OSError) else None
    return strerror or type(error).__name__


def _open(url: str, name: str) -> AbstractContextManager[IO[bytes]]:
    """The file `name` below `url`, open for reading."""
    if urlsplit(url).scheme in ("http", "https"):
        return _open_http(url, name)
    import fsspec

    try:
        # An instance of its own: loader processes fork, and a backend's event loop does not.
        filesystem, root = fsspec.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        scheme = urlsplit(url).scheme
        reason = f"pip install {error.name}" if error.name else "install its fsspec backend"
        if scheme in ("s3", "s3a"):
            reason = "pip install 'lbr-ds[s3]'"
        raise EnvironmentProblem(f"{scheme}:// needs a package that is missing; {reason}") from None
    except ValueError:
        raise ConfigError(f"{shown(url)}: no such kind of address is known") from None
    opened: AbstractContextManager[IO[bytes]] = filesystem.open(f"{root.rstrip('/')}/{name}", "rb")
    return opened


def _open_http(url: str, name: str) -> AbstractContextManager[IO[bytes]]:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    path = f"{parts.path.rstrip('/')}/{name}"
    request = urllib.request.Request(urlunsplit((parts.scheme, host, path, parts.query, "")))
    if user:
        word = base64.b64encode(unquote(user).encode()).decode()
        # Not for another host that this one may send us to.
        request.add_unredirected_header("Authorization", f"Basic {word}")
    opened: AbstractContextManager[IO[bytes]] = urllib.request.urlopen(request, timeout=_TIMEOUT)
    return opened
