"""Encode texts on all ranks, a share on each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from lbr_ds.distributed import World


def encode_across_ranks(
    world: World, texts: list[str], encode: Callable[[list[str]], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return `encode(texts)`, (N, D) float32, where each rank encodes a share of the texts.

    Every rank calls it with the same texts and gets all rows, in host memory.
    """
    if world.size == 1 or not texts:
        return encode(texts)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    order += order[-1:] * (-len(order) % world.size)  # equal counts: the shortest text once more
    mine = encode([texts[i] for i in order[world.rank :: world.size]])
    rows = world.gather(torch.from_numpy(np.ascontiguousarray(mine, np.float32))).numpy()
    vectors = np.empty((len(texts), rows.shape[1]), np.float32)
    vectors[np.array(order).reshape(-1, world.size).T.reshape(-1)] = rows
    return vectors
