"""Paths and URLs: recognise, check, and show them without secrets."""

from __future__ import annotations

import base64
import re
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lbr_ds.errors import ConfigError
from lbr_ds.system.masking import strip_user

CACHE_GIB = 50.0  # default of data.cache_gib
_IP6 = re.compile(r"(?<=//)\[[0-9a-f:.%]*|(?<=@)\[[0-9a-f:.%]*", re.I)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")


def is_url(place: str | Path) -> bool:
    """Return whether `place` is `scheme://...` and not a path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def path_or_url(place: str | Path) -> Path | str:
    """Return a path as a Path, and a URL as it is.

    Raises ValueError for `pipe:`, which would start a program, and for chained URLs.
    """
    text = str(place)
    if text.startswith("pipe:") or "::" in _IP6.sub("", text):
        raise ValueError("give a folder, http(s)://, s3:// or another plain URL")
    return check_url(text) if is_url(text) else Path(expand_home(text))


def expand_home(place: str) -> str:
    """Replace a `~` at the start of a path by the home folder; return any other text as it is.

    Every path of a recipe and of the command line goes through this function. Raises ValueError for
    `~NAME` if there is no such user.
    """
    if not place.startswith("~"):
        return place
    try:
        return str(Path(place).expanduser())
    except RuntimeError:
        raise ValueError(f"no home folder is known for {place.split('/')[0]!r}") from None


def check_url(place: str) -> str:
    """Return `place`. Raises ValueError for a URL that cannot be split into its parts."""
    try:
        parts = urlsplit(place)
        if parts.scheme in ("http", "https") and (not parts.hostname or parts.port == 0):
            raise ValueError("no host")
    except ValueError:  # its message may quote a part of the password
        if "://" not in place:
            return place
        raise ValueError(
            "not a valid URL; correct its host and port, and write special characters of a "
            "password as %XX"
        ) from None
    return place


def http_request(url: str) -> urllib.request.Request:
    """Return a GET request for `url`, with its user and password as Basic authorization.

    They are not sent to a host that the response redirects to. Raises ConfigError for an invalid
    URL.
    """
    try:
        parts = urlsplit(check_url(url))
        request = urllib.request.Request(strip_user(url))
    except ValueError as error:
        raise ConfigError(f"{public_url(url)}: {error}") from None
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header(
            "Authorization", f"Basic {base64.b64encode(login.encode()).decode()}"
        )
    return request


def public_url(place: str | Path) -> str:
    """Return a place for messages: a URL loses its user, password, query and final slash."""
    if not is_url(place):
        return str(place)
    return re.split(r"[?#]", strip_user(str(place)), maxsplit=1)[0].rstrip("/")


def local_path(place: Path | str) -> Path | None:
    """Return the path of a path or a `file://` URL; None for any other URL."""
    if isinstance(place, Path):
        return place
    return Path(place.removeprefix("file://")) if place.startswith("file:///") else None


def require_local(place: Path | str) -> Path:
    """Return the path of a folder to write into. Raises ConfigError for a remote URL."""
    if (path := local_path(place)) is None:
        raise ConfigError(
            f"data.folder={public_url(place)} can only be read; name a local folder, "
            "then copy what is made there"
        )
    return path
