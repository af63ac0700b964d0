"""InfoNCE over the candidates of all ranks, in a plain torch loop.

    torchrun --nproc-per-node 2 info_nce_over_ranks.py

Each rank encodes its own pairs and scores its own queries against the candidates of all ranks. The
printed losses do not depend on the number of ranks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from lbr_ds.distributed import gather_with_gradient
from lbr_ds.objectives.info_nce import info_nce

PAIRS, SIZE = 8, 16  # pairs of a step over all ranks, numbers of a text's features


def main() -> None:
    """Train a linear encoder on made-up pairs for thirty steps."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
    )
    torch.manual_seed(0)  # the same weights and data on all ranks
    model = DistributedDataParallel(torch.nn.Linear(SIZE, SIZE).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(30):
        texts = torch.randn(PAIRS, SIZE, device=device)
        noise = torch.randn(PAIRS, SIZE, device=device)
        own = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
        pairs = torch.cat([texts[own], (texts + noise / 2)[own]])
        queries, candidates = normalize(model(pairs), dim=-1).chunk(2)
        # Candidates of all ranks in rank order, so the positive of query i is candidate offset + i.
        positives = rank * len(queries) + torch.arange(len(queries), device=device)
        loss, _ = info_nce(
            queries, gather_with_gradient(candidates), temperature=0.1, positives=positives
        )
        loss.backward()  # DistributedDataParallel averages the gradients: no further factor
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean / world:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
