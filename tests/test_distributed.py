"""Ranks that agree."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lbr_ds.distributed import agree
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.system import environment


def test_a_rank_with_other_versions_says_so() -> None:
    store, ours = dist.HashStore(), environment.versions()
    agree(store, 0, ours)
    agree(store, 1, ours)
    with pytest.raises(EnvironmentProblem, match=r"ranks 0 and 3 \(.+\) .+torch: .+ -> 1\.2\);"):
        agree(store, 3, ours | {"torch": "1.2"})
