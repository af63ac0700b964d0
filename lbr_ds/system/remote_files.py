"""Read files behind URLs in ranges, by several threads, without a copy on this disk.

`http://` and `https://` are read with system/download.py, every other scheme (`s3://`, `gs://`,
`hf://`, ..) with fsspec, whose backend must be installed and finds its credentials itself.

Every range is requested again after a temporary failure, from the byte where it broke off. What
identifies the content of a file (its ETag, hash or time of change) is compared with what it was
when the files were listed: in each answer over HTTP, and with `RemoteFiles.check` elsewhere.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, Unreachable
from lbr_ds.system.download import CHUNK_BYTES, DamagedDownload, extent, open_http, retry
from lbr_ds.system.threads import map_ahead
from lbr_ds.system.urls import public_url

RANGE_BYTES = 8 << 20  # of a request
FIRST_BYTES = 1 << 18  # of the first request if only the beginning of a file may be needed
_MAGIC = "*?["
_VERSIONS = ("ETag", "etag", "sha256", "blob_id", "md5Hash", "generation", "LastModified", "mtime")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with the methods of a Path that readers of formats use.

    Attributes:
        url: Its URL.
        size: Its length in bytes.
        version: What changes with its content.
    """

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return public_url(self.url)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name

    @property
    def stem(self) -> str:
        """Its name without the last suffix."""
        return PurePosixPath(self.name).stem

    def fetch(self, begin: int, end: int) -> bytes:
        """Return a range of its bytes.

        Raises:
            Unreachable: It cannot be fetched after some tries.
            EnvironmentProblem: The file has changed.
        """
        held = bytearray()

        def attempt() -> None:
            if _is_http(self.url):
                self._request(begin, end, held)
            else:
                files, path = filesystem(self.url)
                # Without these options, files of the hub are read ahead of the range.
                hub = {"cache_type": "none", "size": self.size}
                options = hub if self.url.startswith("hf://") else {}
                held[:] = files.cat_file(path, start=begin, end=end, **options)
            if len(held) != end - begin:
                raise DamagedDownload(f"truncated, {len(held)} bytes of {end - begin}")

        try:
            retry(str(self), attempt)
        except FileNotFoundError:
            raise EnvironmentProblem(f"{self}: the file is gone; start again") from None
        except DamagedDownload as error:
            raise Unreachable(
                f"{self}: bytes {begin} to {end} cannot be fetched ({error}); try again later"
            ) from None
        return bytes(held)

    def _request(self, begin: int, end: int, held: bytearray) -> None:
        """Append what is missing of a range to `held`."""
        headers = {"Range": f"bytes={begin + len(held)}-{end - 1}"}
        with open_http(self.url, headers) as response:
            start, total = extent(response)
            if (total, _http_version(response)) != (self.size, self.version):
                raise self.changed()
            if response.status != 206 or start != begin + len(held):
                raise DamagedDownload("another range than requested")
            while len(held) < end - begin and (part := response.read(CHUNK_BYTES)):
                held += part

    def changed(self) -> EnvironmentProblem:
        """Return the error for a file that is not what it was when it was listed."""
        return EnvironmentProblem(f"{self}: the file has changed while it was read; start again")

    def open(self, begin: int = 0, end: int = 0, *, few: bool = False) -> io.BufferedReader:
        """Open a part of the file (end 0: to its end) that is read from its start on.

        few: Whether its first bytes may be all that is read.
        """
        return io.BufferedReader(_Stream(self, begin, end or self.size, few), CHUNK_BYTES)

    def ranges(self) -> io.RawIOBase:
        """Open the file for a reader that seeks; each call of `read` is a request."""
        return _Ranges(self)


@dataclass(frozen=True)
class RemoteFiles:
    """The files that a URL names. A copy that is sent to another process does not list them.

    Attributes:
        url: The URL: of a file, of a folder (of the hub: with other files), or a pattern.
        name: The name of the file; of several files, the name of their folder.
        many: Whether it is a folder or a pattern.
        listed: The files in the order of their names, if they were listed.
    """

    url: str
    name: str
    many: bool
    listed: tuple[RemoteFile, ...] = ()

    def __str__(self) -> str:
        return public_url(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "listed": ()}

    def is_dir(self) -> bool:
        """Return whether it is a folder or a pattern."""
        return self.many

    def check(self) -> None:
        """Raise EnvironmentProblem if a file has changed since the files were listed.

        Over HTTP every answer was compared already.
        """
        if _is_http(self.url):
            return
        now = {file.url: file for file in list_files(self.url).listed}
        for file in self.listed:
            if now.get(file.url) != file:
                raise file.changed()


def list_files(url: str) -> RemoteFiles:
    """Return the files that a URL names.

    It may be a folder or a pattern (`s3://bucket/part-*.parquet`); over HTTP, which has no lists of
    files, a range of names in braces (`https://host/part-{000..999}.parquet`).

    Raises:
        DataError: There is no such file.
        ConfigError: The scheme is unknown.
        EnvironmentProblem: The server cannot be reached, or does not send ranges.
    """
    path = urlsplit(url).path
    if _is_http(url):
        return _list_http(url)
    files, root = filesystem(url)
    files.invalidate_cache()

    def look() -> tuple[bool, list[dict[str, Any]]]:
        if any(letter in path for letter in _MAGIC):
            return True, [*files.glob(root, detail=True).values()]
        if path.endswith("/") or files.isdir(root):
            return True, [*files.find(root, detail=True).values()]
        return False, [files.info(root)]

    try:
        many, found = retry(public_url(url), look)
    except FileNotFoundError:
        many, found = False, []
    listed = [
        RemoteFile(files.unstrip_protocol(info["name"]), info["size"], _version(info))
        for info in sorted(found, key=lambda info: info["name"])
        if info["type"] == "file"
    ]
    if not listed:
        raise DataError(f"{public_url(url)}: no such file; check the address")
    place = PurePosixPath(path)
    folder = place.parent.name if any(letter in place.name for letter in _MAGIC) else place.name
    return RemoteFiles(url, folder if many else listed[0].name, many, tuple(listed))


def _list_http(url: str) -> RemoteFiles:
    from braceexpand import braceexpand

    urls = list(braceexpand(url, escape=False))
    found = [(one, file) for one, file in zip(urls, map_ahead(http_file, urls), strict=True)]
    for one, file in found:
        if file is None:
            raise EnvironmentProblem(
                f"{public_url(one)}: the server sends no ranges of files; download the files"
            )
    listed = tuple(file for _, file in found if file is not None)
    many = len(urls) > 1
    name = PurePosixPath(urlsplit(listed[0].url).path).parent.name if many else listed[0].name
    return RemoteFiles(url, name, many, listed)


def http_file(url: str) -> RemoteFile | None:
    """Return the file behind an HTTP URL; None if its server does not send ranges.

    Raises:
        DataError: There is no such file.
        EnvironmentProblem: The server cannot be reached.
    """

    def look() -> RemoteFile | None:
        with open_http(url, {"Range": "bytes=0-0"}) as response:
            _, total = extent(response)
            if response.status != 206 or total is None:
                return None
            return RemoteFile(url, total, _http_version(response))

    try:
        return retry(public_url(url), look)
    except FileNotFoundError:
        raise DataError(
            f"{public_url(url)}: the server has no such file; check the address"
        ) from None


def _http_version(response: Any) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _version(info: dict[str, Any]) -> str:
    """Return what identifies the content of a file in what fsspec says of it."""
    large = info.get("lfs") or {}  # of a file on the Hugging Face hub: its sha256
    known = {**info, **({"sha256": large["sha256"]} if "sha256" in large else {})}
    return next((str(known[name]) for name in _VERSIONS if known.get(name)), "")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, one per process and host, and the path in it.

    Raises:
        EnvironmentProblem: A package for the scheme is missing.
        ConfigError: The scheme is unknown.
    """
    parts = urlsplit(url)
    # Not shared with a forked process, which a backend's event loop cannot be.
    files = _filesystem(f"{parts.scheme}://{parts.netloc}", os.getpid())
    return files, files._strip_protocol(url)


@lru_cache(maxsize=8)
def _filesystem(root: str, process: int) -> Any:
    import fsspec

    try:
        return fsspec.url_to_fs(f"{root}/", skip_instance_cache=True)[0]
    except ImportError as error:
        scheme = urlsplit(root).scheme
        reason = f"pip install {error.name}" if error.name else "install its fsspec backend"
        if scheme in ("s3", "s3a"):
            reason = "pip install 'lbr-ds[s3]'"
        raise EnvironmentProblem(f"{scheme}:// needs a package that is missing; {reason}") from None
    except ValueError:
        raise ConfigError(f"{public_url(root)}: no such kind of address is known") from None


class _Stream(io.RawIOBase):
    """The bytes of a part of a file, in order, fetched in ranges by several threads."""

    def __init__(self, file: RemoteFile, begin: int, end: int, few: bool) -> None:
        start = min(begin + FIRST_BYTES, end) if few else begin
        starts = [begin, *range(start, max(start + 1, end - RANGE_BYTES + 1), RANGE_BYTES)]
        bounds = [(a, b) for a, b in pairwise([*starts, end]) if a < b]
        self._ranges = map_ahead(lambda bound: file.fetch(*bound), bounds)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._ranges, b""))
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._ranges.close()  # type: ignore[attr-defined]
        super().close()


class _Ranges(io.RawIOBase):
    """A file in which every read is a request."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}
        self._place = starts[whence] + offset
        return self._place

    def readinto(self, target: Any) -> int:
        end = min(self._place + len(target), self._file.size)
        raw = self._file.fetch(self._place, end) if self._place < end else b""
        target[: len(raw)] = raw
        self._place += len(raw)
        return len(raw)
