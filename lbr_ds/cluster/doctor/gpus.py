"""Every GPU of this host: whose memory it holds, whether it computes, and how fast beside the rest.

The products have not been run on a GPU so far; without one the processor takes them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lbr_ds.cluster.plan.memory import RESERVE
from lbr_ds.errors import EnvironmentProblem

_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices; three of 8192 take 384 MiB in bf16
_ROUNDS, _TIMES = 3, 10
SLOW = 1.3  # times the fastest of its kind here: such a GPU slows all ranks, each waits for it


@dataclass(frozen=True)
class Gpu:
    """taken: bytes that other processes hold. fault: what its products are; empty: sound.
    seconds: of one product."""

    name: str
    taken: int = 0
    fault: str = ""
    seconds: float = 0.0


def look() -> list[Gpu]:
    """All GPUs that this process sees, one after the other; without one the processor."""
    if not torch.cuda.is_available():
        return [Gpu("CPU", 0, *product(torch.device("cpu")))]
    return [_look(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def _look(device: torch.device) -> Gpu:
    try:
        name = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        # This process's own context is within what the plan sets aside.
        if total - free > RESERVE:
            return Gpu(name, taken=total - free)
        return Gpu(name, 0, *product(device))
    except RuntimeError as error:  # CUDA's: memory that cannot be corrected, a GPU off the bus
        return Gpu("no name", fault=f"fails ({str(error).splitlines()[0]})")


def product(device: torch.device) -> tuple[str, float]:
    """(what is wrong with a matrix product, its seconds), the same product taken again and again.

    Seconds are the fastest round's: the clock rises with the first ones.
    """
    side, dtype = _SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    first = a @ b
    if not first.isfinite().all():
        return "a product is not finite", 0.0
    seconds = []
    for _ in range(_ROUNDS):
        _wait(device)
        began = time.perf_counter()
        for _ in range(_TIMES):
            again = a @ b
        _wait(device)
        seconds.append((time.perf_counter() - began) / _TIMES)
        if not torch.equal(first, again):
            return "the same product differs from time to time", 0.0
    return "", min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge(found: list[Gpu], *, promised: int, ranks: int, host: str) -> str:
    """What there is, in one clause. promised: GPUs that SLURM gave, 0: it does not say.

    Raises EnvironmentProblem with every fault, when GPUs are missing, taken, wrong or slow.
    """
    gpus = [gpu for gpu in found if gpu.name != "CPU"]
    faults = []
    if len(gpus) < promised:
        build = "" if torch.version.cuda or torch.version.hip else " (a torch for CPUs only)"
        faults.append(f"SLURM gave {promised} GPU(s), {len(gpus)} can be used here{build}")
    if gpus and ranks > len(gpus):
        faults.append(
            f"{ranks} ranks for {len(gpus)} GPU(s), and one drives one: "
            f"sbatch --ntasks-per-node={len(gpus)}"
        )
    for number, gpu in enumerate(found):
        name = f"GPU {number} ({gpu.name})" if gpus else "the processor"
        fastest = min((g.seconds for g in found if g.name == gpu.name and g.seconds), default=0)
        if gpu.taken:
            size = f"{gpu.taken / (1 << 30):.1f} GiB"
            faults.append(f"{name}: {size} of its memory are taken; end what runs there")
        elif gpu.fault:
            faults.append(f"{name}: {gpu.fault}")
        elif gpu.seconds > SLOW * fastest:
            faults.append(
                f"{name}: a product takes {gpu.seconds * 1e3:.2f} ms, "
                f"{fastest * 1e3:.2f} ms beside it"
            )
    if faults:
        raise EnvironmentProblem(
            f"{'; '.join(faults)}; or leave the node out with sbatch --exclude={host}"
        )
    return f"{len(gpus)} x {gpus[0].name}" if gpus else "no GPU"
