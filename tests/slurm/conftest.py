"""The cluster, once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Two nodes of this host. Without SLURM's programs the tests fail, on purpose: no skips."""
    with running() as up:
        yield up
