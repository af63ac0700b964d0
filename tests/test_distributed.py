"""Ranks that check_same_versions."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lbr_ds.distributed import check_same_versions
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import environment


def test_a_rank_with_other_versions_says_so() -> None:
    store, ours = dist.HashStore(), environment.versions()
    check_same_versions(store, 0, ours)
    check_same_versions(store, 1, ours)
    with pytest.raises(EnvironmentProblem, match=r"ranks 0 and 3 \(.+\) .+torch: .+ -> 1\.2\);"):
        check_same_versions(store, 3, ours | {"torch": "1.2"})
