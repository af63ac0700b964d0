"""`data.folder` in a recipe: a path or a URL, and its secrets stay out of what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lbr_ds.config import DataConfig, load
from lbr_ds.errors import ConfigError
from lbr_ds.system.urls import is_url, local_path, path_or_url, public_url

SECRET = "https://me:hidden@host:81/a/b/?sign=secret#x"


@pytest.mark.parametrize("place", ["a/b", "/a:b", "x~/y", "C:x", Path("s3://x")])
def test_paths(place: str | Path) -> None:
    assert not is_url(place)
    assert path_or_url(place) == Path(place)
    assert public_url(place) == str(place)


@pytest.mark.parametrize("place", ["s3://bucket/a", "http://h/x", "memory://b", "file:///a/b"])
def test_urls(place: str) -> None:
    assert is_url(place)
    assert path_or_url(place) == place == public_url(place)


def test_secrets_are_not_shown() -> None:
    assert public_url(SECRET) == "https://host:81/a/b"
    run = load("demo", [f"data.folder={SECRET}"])
    assert run.data.folder == SECRET
    assert "hidden" not in run.dump()
    assert "secret" not in run.dump()
    assert "folder: https://host:81/a/b" in run.dump()


def test_a_file_url_is_read_through_the_cache_and_written_where_it_lies() -> None:
    data = DataConfig.model_validate({"folder": "file:///a/b"})
    assert is_url(data.folder)
    assert (
        data.local_folder == local_path("file:///a/b") == local_path(Path("/a/b")) == Path("/a/b")
    )
    assert local_path("s3://a/b") is local_path("file://host/a") is None


def test_what_writes_needs_a_local_folder() -> None:
    assert DataConfig(folder=Path("a")).local_folder == Path("a")
    assert DataConfig.model_validate({"folder": "a"}).folder == Path("a")
    with pytest.raises(ConfigError, match=r"data.folder=https://host:81/a/b can only be read"):
        assert DataConfig(folder=SECRET).local_folder


@pytest.mark.parametrize(
    "place", ["pipe:ls", "pipe:curl http://x", "simplecache::s3://a", "s3://a::b"]
)
def test_refused(place: str) -> None:
    with pytest.raises(ValidationError, match="another plain URL"):
        DataConfig.model_validate({"folder": place})
    with pytest.raises(ConfigError, match=r"data.folder: give a folder, http\(s\)://, s3:// or"):
        load("demo", [f"data.folder={place}"])
