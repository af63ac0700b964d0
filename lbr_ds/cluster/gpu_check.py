"""Check the GPUs of this host: free memory, correct results, and the same speed on each of a kind.

Without a GPU, the processor computes the matrix products.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lbr_ds.errors import EnvironmentProblem
from lbr_ds.plan.fit import GPU_RESERVE

_SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices; three of 8192 take 384 MiB in bf16
_ROUNDS, _TIMES = 3, 10
SLOW = 1.3  # times the fastest of its kind here; all ranks wait for such a GPU


@dataclass(frozen=True)
class GpuState:
    """What was found about one GPU.

    Attributes:
        taken: bytes that other processes hold.
        fault: what is wrong with it; empty if nothing is.
        seconds: of one matrix product.
    """

    name: str
    taken: int = 0
    fault: str = ""
    seconds: float = 0.0


def probe() -> list[GpuState]:
    """Probe all GPUs that this process sees, one after the other; without one the processor."""
    if not torch.cuda.is_available():
        return [GpuState("CPU", 0, *product(torch.device("cpu")))]
    return [_probe(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def _probe(device: torch.device) -> GpuState:
    try:
        name = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        # This process's own context fits into the plan's reserve.
        if total - free > GPU_RESERVE:
            return GpuState(name, taken=total - free)
        return GpuState(name, 0, *product(device))
    except RuntimeError as error:  # of CUDA: an uncorrectable memory error, a GPU off the bus
        return GpuState("no name", fault=f"fails ({str(error).splitlines()[0]})")


def product(device: torch.device) -> tuple[str, float]:
    """Compute the same matrix product again and again.

    Returns:
        (what is wrong with it or "", the seconds of one product in the fastest round: clocks rise
        during the first ones).
    """
    side, dtype = _SIDE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(side, side, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    first = a @ b
    if not first.isfinite().all():
        return "a matrix product is not finite", 0.0
    seconds = []
    for _ in range(_ROUNDS):
        _wait(device)
        began = time.perf_counter()
        for _ in range(_TIMES):
            again = a @ b
        _wait(device)
        seconds.append((time.perf_counter() - began) / _TIMES)
        if not torch.equal(first, again):
            return "the same matrix product gives different results", 0.0
    return "", min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check(states: list[GpuState], *, promised: int, ranks: int, host: str) -> str:
    """Return what GPUs there are, in one clause.

    Args:
        states: all GPUs, as `probe` returns them.
        promised: GPUs that SLURM has allocated; 0 if it does not say.
        ranks: ranks that will run on this host.
        host: its name, for --exclude.

    Raises:
        EnvironmentProblem: one line with every fault.
    """
    gpus = [gpu for gpu in states if gpu.name != "CPU"]
    faults = []
    if len(gpus) < promised:
        build = "" if torch.version.cuda or torch.version.hip else " (a torch for CPUs only)"
        faults.append(f"SLURM allocated {promised} GPU(s), {len(gpus)} can be used here{build}")
    if gpus and ranks > len(gpus):
        faults.append(
            f"{ranks} ranks for {len(gpus)} GPU(s), but each rank needs its own: "
            f"sbatch --ntasks-per-node={len(gpus)}"
        )
    for number, gpu in enumerate(states):
        name = f"GPU {number} ({gpu.name})" if gpus else "the processor"
        fastest = min((g.seconds for g in states if g.name == gpu.name and g.seconds), default=0)
        if gpu.taken:
            size = f"{gpu.taken / (1 << 30):.1f} GiB"
            faults.append(f"{name}: {size} of its memory are in use by other processes; stop them")
        elif gpu.fault:
            faults.append(f"{name}: {gpu.fault}")
        elif gpu.seconds > SLOW * fastest:
            faults.append(
                f"{name}: a matrix product takes {gpu.seconds * 1e3:.2f} ms, "
                f"{fastest * 1e3:.2f} ms on the fastest GPU of its kind"
            )
    if faults:
        raise EnvironmentProblem(
            f"{'; '.join(faults)}; or leave the node out with sbatch --exclude={host}"
        )
    return f"{len(gpus)} x {gpus[0].name}" if gpus else "no GPU"
