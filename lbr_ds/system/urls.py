"""Where a prepared folder lies: a path, or a URL that it is read from."""

from __future__ import annotations

import base64
import re
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lbr_ds.errors import ConfigError
from lbr_ds.system.masking import mask_record, mask_secrets, strip_user

__all__ = [
    "CACHE_GIB",
    "check_url",
    "expand_home",
    "http_request",
    "is_url",
    "local_path",
    "mask_record",
    "mask_secrets",
    "path_or_url",
    "public_url",
    "require_local",
]
CACHE_GIB = 50.0  # what fetched shards may take of a disk, unless the recipe says otherwise
_IP6 = re.compile(r"(?<=//)\[[0-9a-f:.%]*|(?<=@)\[[0-9a-f:.%]*", re.I)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")


def is_url(place: str | Path) -> bool:
    """Whether `place` is `scheme://...` and not a path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def path_or_url(place: str | Path) -> Path | str:
    """A path as a Path, a URL as it is.

    Raises ValueError for what starts a program elsewhere (`pipe:`) and for chained addresses.
    """
    text = str(place)
    if text.startswith("pipe:") or "::" in _IP6.sub("", text):
        raise ValueError("give a folder, http(s)://, s3:// or another plain URL")
    return check_url(text) if is_url(text) else Path(expand_home(text))


def expand_home(place: str) -> str:
    """Return a path with the home folder in place of a `~` at its start; any other text as it is.

    This is the only place that does so: for every path of a recipe (by the types below) and of the
    command line. A relative path is relative to the working directory. Raises ValueError for
    `~NAME` where there is no such user.
    """
    if not place.startswith("~"):
        return place
    try:
        return str(Path(place).expanduser())
    except RuntimeError:
        raise ValueError(f"no home folder is known for {place.split('/')[0]!r}") from None


def check_url(place: str) -> str:
    """The place. Raises ValueError for an address whose parts cannot be told apart."""
    try:
        parts = urlsplit(place)
        if parts.scheme in ("http", "https") and (not parts.hostname or parts.port == 0):
            raise ValueError("no host")
    except ValueError:  # its text may quote a part of the password
        if "://" not in place:
            return place
        raise ValueError(
            "not a valid address; correct its host and port, and write special characters of a "
            "password as %XX"
        ) from None
    return place


def http_request(url: str) -> urllib.request.Request:
    """Return what asks for `url` with its user and password, if it has some, as HTTP expects them.

    They are not sent on to where the answer redirects to. Raises ConfigError for an address that
    cannot be one.
    """
    try:
        parts = urlsplit(check_url(url))
        asked = urllib.request.Request(strip_user(url))
    except ValueError as error:
        raise ConfigError(f"{public_url(url)}: {error}") from None
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        asked.add_unredirected_header(
            "Authorization", f"Basic {base64.b64encode(login.encode()).decode()}"
        )
    return asked


def public_url(place: str | Path) -> str:
    """The place for messages: of a URL no user, password, query, nor a slash at its end."""
    if not is_url(place):
        return str(place)
    return re.split(r"[?#]", strip_user(str(place)), maxsplit=1)[0].rstrip("/")


def local_path(place: Path | str) -> Path | None:
    """The path, also of `file://`, which is read through the cache as any URL; else None."""
    if isinstance(place, Path):
        return place
    return Path(place.removeprefix("file://")) if place.startswith("file:///") else None


def require_local(place: Path | str) -> Path:
    """The path, for what writes into it. Raises ConfigError for a URL of elsewhere."""
    if (path := local_path(place)) is None:
        raise ConfigError(
            f"data.folder={public_url(place)} can only be read; name a local folder, "
            "then copy what is made there"
        )
    return path
