"""Where a prepared folder lies: a path, or a URL that it is read from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, PlainSerializer

from lbr_ds.errors import ConfigError

CACHE_GIB = 50.0  # what fetched shards may take of a disk, unless the recipe says otherwise
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")


def is_url(place: str | Path) -> bool:
    """Whether `place` is `scheme://...` and not a path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def folder_of(place: str | Path) -> Path | str:
    """A path as a Path, a URL as it is.

    Raises ValueError for what starts a program elsewhere (`pipe:`) and for chained addresses.
    """
    text = str(place)
    if text.startswith("pipe:") or "::" in text:
        raise ValueError("give a folder, http(s)://, s3:// or another plain URL")
    return text if is_url(text) else Path(place)


def shown(place: str | Path) -> str:
    """The place for messages: of a URL no user, password, query, nor a slash at its end."""
    if not is_url(place):
        return str(place)
    parts = urlsplit(str(place))
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/")


def local(place: Path | str) -> Path:
    """The path, for what writes into it. Raises ConfigError for a URL."""
    if isinstance(place, str):
        raise ConfigError(
            f"data.folder={shown(place)} can only be read; name a local folder, "
            "then copy what is made there"
        )
    return place


# What a recipe says; its secrets are not written down with the resolved recipe.
Folder = Annotated[
    Path | str,
    AfterValidator(folder_of),
    PlainSerializer(shown, return_type=str, when_used="json"),
]
