"""A prepared folder of three uneven shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shards.toy import make_folder


@pytest.fixture(scope="session")
def shared_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """103 records in shards of 40, 40 and 23; not to be changed."""
    return make_folder(tmp_path_factory.mktemp("shards") / "data", 103, 40)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The same, a test's own to damage."""
    return make_folder(tmp_path / "data", 103, 40)
