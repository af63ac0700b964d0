"""Peak memory of a call, counted from torch's own record of allocations."""

from __future__ import annotations

import torch

from lbr_ds.bench.peak_memory import peak_bytes


def test_peak_memory_is_what_was_held_at_once() -> None:
    def run() -> None:
        first = torch.ones(1000)
        del first
        both = torch.ones(2000), torch.ones(3000)
        del both

    assert peak_bytes(run) == 5000 * 4
