"""Where a prepared folder lies: a path, or a URL that it is read from."""

from __future__ import annotations

import logging
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


_SECRETS = (
    # scheme://user:password@host
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.I), r"\1"),
    # ?token=..., of a presigned URL the whole query
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s?'\"#]*)\?[^\s'\"#]*", re.I), r"\1"),
    # HF_TOKEN=..., "password": "..."; not micro_batch_tokens=...
    (re.compile(r"(\b\w*(?:token|secret|passw(?:or)?d|api_?key|access_?key)['\"]?\s*[=:]\s*)"
                r"['\"]?[^\s'\"]+['\"]?", re.I), r"\1***"),
    (re.compile(r"\b(?:hf_\w{20,}|AKIA[A-Z0-9]{16}|(?:Bearer|Basic) [\w.~+/=-]{8,})"), "***"),
)  # fmt: skip


def masked(text: str) -> str:
    """A text without what looks like a secret: users, passwords and queries of URLs, tokens."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def mask_record(record: logging.LogRecord) -> bool:
    """A filter for the handlers of our log."""
    record.msg, record.args = masked(record.getMessage()), ()
    return True


def path_of(place: Path | str) -> Path | None:
    """The path, also of `file://`, which is read through the cache as any URL; else None."""
    if isinstance(place, Path):
        return place
    return Path(place.removeprefix("file://")) if place.startswith("file:///") else None


def local(place: Path | str) -> Path:
    """The path, for what writes into it. Raises ConfigError for a URL of elsewhere."""
    if (path := path_of(place)) is None:
        raise ConfigError(
            f"data.folder={shown(place)} can only be read; name a local folder, "
            "then copy what is made there"
        )
    return path


# What a recipe says; its secrets are not written down with the resolved recipe.
Folder = Annotated[
    Path | str,
    AfterValidator(folder_of),
    PlainSerializer(shown, return_type=str, when_used="json"),
]

# Of a text that may be a URL, likewise.
Masked = Annotated[str, PlainSerializer(masked, return_type=str, when_used="json")]
