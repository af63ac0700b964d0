"""What is measured in this process joins a group of one rank; it is left when all is done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lbr_ds.distributed import leave


@pytest.fixture(scope="session", autouse=True)
def _leave_at_the_end() -> Iterator[None]:
    yield
    leave()
