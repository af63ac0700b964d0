"""Fetch the files of a prepared folder behind a URL to this disk, and check them.

`http://` and `https://` use system/download.py, every other scheme (`s3://`, `gs://`, ..) fsspec,
whose backend must be installed and finds its credentials itself. Nothing here starts a program, and
messages show URLs without user, password and query.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from lbr_ds.errors import DataError
from lbr_ds.shards import cache
from lbr_ds.system.download import CHUNK_BYTES, DamagedDownload, open_http, retry
from lbr_ds.system.locate import cache_folder
from lbr_ds.system.remote_files import filesystem
from lbr_ds.system.urls import public_url


@dataclass(frozen=True)
class Remote:
    """The folder at `url`; fetched shards may take `cache_gib` GiB of this disk."""

    url: str
    cache_gib: float

    @property
    def place(self) -> str:
        """The URL for messages."""
        return public_url(self.url)

    @property
    def folder(self) -> Path:
        """Where fetched shards of all folders are stored."""
        return cache_folder() / "shards"

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, None if there is none; retry as `file` does."""

        def whole() -> bytes:
            with _open(self.url, name) as source:
                return source.read()

        try:
            return retry(f"{self.place}/{name}", whole)
        except FileNotFoundError:
            return None

    def file(self, name: str, length: int, sha256: str) -> Path:
        """Return the cached file of this length and hash; fetch it from `name` if necessary.

        Raises:
            DataError: The remote file is missing or altered.
            EnvironmentProblem: The URL cannot be reached after some tries.
            ConfigError: The cache is too small for the file.
        """
        where = f"{self.place}/{name}"

        def fetch(part: Path) -> None:
            try:
                retry(where, lambda: _copy(self.url, name, part, length, sha256))
            except FileNotFoundError:
                raise DataError(
                    f"{where}: the manifest names this file and it is missing; copy it there"
                ) from None
            except DamagedDownload as error:
                raise DataError(f"{where}: {error}; copy the file there again") from None

        limit = int(self.cache_gib * 2**30)
        return cache.keep(self.folder, f"{sha256}.tar", length, limit, fetch)


def _copy(url: str, name: str, part: Path, length: int, sha256: str) -> None:
    digest, count = hashlib.sha256(), 0
    with _open(url, name) as source, part.open("r+b") as target:
        while piece := source.read(CHUNK_BYTES):
            digest.update(piece)
            count += len(piece)
            if count > length:
                raise DamagedDownload(f"longer than the manifest's {length} bytes")
            target.write(piece)
    if count != length:
        raise DamagedDownload(f"truncated: {count} bytes, but the manifest lists {length}")
    if digest.hexdigest() != sha256:
        actual = digest.hexdigest()[:12]
        raise DamagedDownload(
            f"altered: its sha256 is {actual}.., but the manifest lists {sha256[:12]}.."
        )


def _open(url: str, name: str) -> AbstractContextManager[IO[bytes]]:
    """Return the file `name` below `url`, open for reading."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        opened: AbstractContextManager[IO[bytes]] = open_http(
            urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}", fragment=""))
        )
        return opened
    files, root = filesystem(url)
    file: AbstractContextManager[IO[bytes]] = files.open(f"{root.rstrip('/')}/{name}", "rb")
    return file
