"""Ranks and what they exchange. The only module that imports torch.distributed.

Everything also works without a process group: the world then has one rank.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lbr_ds.errors import EnvironmentProblem, short
from lbr_ds.system import environment
from lbr_ds.system.slurm import slurm_tasks

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GLOO = re.compile(r"gloo|Connection (closed|reset) by peer|Socket Timeout|Broken pipe")


@dataclass(frozen=True)
class World:
    """The place of this process among all ranks.

    Attributes:
        rank: 0 to size - 1.
        size: Number of ranks.
        device: Where this rank's tensors are.
        store: Key-value store for heartbeats and failures (`training/watch.py`); None: one rank.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and logs to the terminal."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """Gather x (n, ...) of each rank; see `gather_with_gradient`."""
        return x if self.size == 1 else gather_with_gradient(x)

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        """Fill `whole` (size * n,) with every rank's `part` (n,), in rank order; no gradient."""
        dist.all_gather_into_tensor(whole, part)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> None:
        """Fill `part` (n,) with this rank's part of the sum of all ranks' `whole` (size * n,)."""
        dist.reduce_scatter_tensor(part, whole)

    def start_average(self, x: Tensor) -> Any:
        """Start to average x over the ranks in place, for `wait`; it is divided, then summed."""
        return dist.all_reduce(x.div_(self.size), async_op=True) if self.size > 1 else None

    def wait(self, started: Any) -> None:
        """Wait for a collective: the host for a CPU's, the current stream for a GPU's."""
        if started is not None:
            started.wait()

    def sum_on_device(self, x: Tensor) -> Tensor:
        """Return x, summed over the ranks in place; the host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def exchange(self, *values: float) -> NDArray[np.float64]:
        """Return every rank's values, (size, n), from host to host: no GPU is waited for."""
        own = np.array(values, np.float64)
        if self.size == 1:
            return own[None]
        whole = np.empty((self.size, len(own)))
        dist.all_gather_into_tensor(torch.from_numpy(whole.reshape(-1)), torch.from_numpy(own))
        return whole

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over the ranks, in float64."""
        return [float(number) for number in self.exchange(*values).sum(0)]

    def max(self, *values: float) -> list[float]:
        """Return the maximum of each value over the ranks."""
        return [float(number) for number in self.exchange(*values).max(0)]

    def share(self, value: Any, source: int = 0) -> Any:
        """Return the value of rank `source` (any picklable object of our own) on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=source)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all ranks (picklable objects of our own), in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def signal(self, event: str) -> None:
        """Signal an event to the ranks that `wait_for` it."""
        if self.store is not None:
            self.store.set(f"events/{event}", "1")

    def wait_for(self, event: str) -> None:
        """Wait until a rank signals an event, without a time limit; a collective would have one.

        Raises a torch.distributed error when the host of the store, rank 0, is gone.
        """
        while self.store is not None and not self.store.check([f"events/{event}"]):
            time.sleep(0.2)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def gather_with_gradient(x: Tensor) -> Tensor:
    """Gather x (n, ...) of each rank into (size * n, ...), in rank order; alone it returns x.

    The gradient of x is the sum over the ranks. n must be the same on all ranks.
    """
    return _Gather.apply(x.contiguous()) if dist.is_initialized() else x


class _Gather(torch.autograd.Function):
    """all-gather forward, reduce-scatter (sum) backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out


def launched_ranks() -> int:
    """Return how many ranks a launcher (ours, torchrun, srun) started; 0: there is no launcher."""
    if "RANK" in os.environ:
        size = os.environ.get("WORLD_SIZE", "1")
        return int(size) if size.isdigit() and int(size) else 1  # `join` refuses any other
    return slurm_tasks()


_joined: World | None = None


def join(timeout_minutes: float) -> World:
    """Join the process group that the environment describes; a second call returns the same.

    Reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK) or SLURM's (SLURM_PROCID,
    SLURM_STEP_NUM_TASKS, SLURM_LOCALID), with MASTER_ADDR and MASTER_PORT. Always creates a group,
    because DeepSpeed needs one.

    Args:
        timeout_minutes: After which a collective without an answer fails.

    Raises:
        EnvironmentProblem: The variables are incomplete, the ranks cannot meet, or the versions of
            this rank differ from those of rank 0.
    """
    global _joined
    if _joined is not None and dist.is_initialized():
        return _joined
    # torch 2.13 deprecates collectives that DeepSpeed 0.19 calls at every step.
    warnings.filterwarnings("ignore", r"`torch.distributed.*is deprecated", FutureWarning)
    if "RANK" not in os.environ and (tasks := slurm_tasks()):
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = str(tasks)
        os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    env = os.environ
    alone = "RANK" not in env
    if alone:
        env["LOCAL_RANK"] = "0"  # DeepSpeed asks the environment for it
    elif "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise EnvironmentProblem(
            "MASTER_ADDR and MASTER_PORT are not set; slurm/common.sh shows how to derive them"
        )
    local, device = _local_rank(env), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Later than training/watch.py, which ends a run without progress and can say who is at fault.
    timeout = timedelta(minutes=timeout_minutes + 1)
    if alone or _on_one_machine(env):
        for library in ("GLOO", "NCCL"):  # where they listen for the other ranks
            env.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    rank, size, store, heartbeats = 0, 1, dist.HashStore(), None
    try:
        if not alone:
            store, rank, size = _rendezvous(env, timeout)
            heartbeats = heartbeat_store(store)
            check_same_versions(store, rank, environment.versions())
        ranks = dist.PrefixStore("ranks", store)
        dist.init_process_group(backend, store=ranks, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise EnvironmentProblem(_refused(env, alone, short(error))) from None
    _joined = World(rank, size, device, heartbeats)
    return _joined


def _refused(env: Mapping[str, str], alone: bool, why: str) -> str:
    if alone:
        return f"the process group cannot be created: {why}"
    where = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
    cure = "check that MASTER_ADDR can be reached from every node and that MASTER_PORT is free"
    return f"the ranks cannot meet at {where}: {why}; {cure}"


def _on_one_machine(env: Mapping[str, str]) -> bool:
    """Return whether all ranks run on this machine, as far as the environment shows."""
    if env["MASTER_ADDR"] in _LOOPBACK or env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        return True
    # A launcher inside of a step of one node may have started ranks on others as well.
    own = env["WORLD_SIZE"] == env.get("SLURM_STEP_NUM_TASKS")
    return own and env.get("SLURM_STEP_NUM_NODES") == "1"


def _rendezvous(env: Mapping[str, str], timeout: timedelta) -> tuple[Any, int, int]:
    """Return the store where the ranks meet, this rank, and the number of ranks.

    Whoever can connect to the store can read and change what ranks exchange in it. On one machine
    rank 0 therefore listens on the loopback interface only; torch's default is all interfaces.
    """
    if env.get(_AGENT_STORE) == "True" or not _on_one_machine(env):
        return next(rendezvous("env://", timeout=timeout))
    rank, size, port = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return _local_store(port, timeout, host=rank == 0, world_size=size), rank, size


def _local_store(port: int, timeout: timedelta, *, host: bool, **options: Any) -> Any:
    """Return a store at a port of the loopback interface; host: this process has it (0: any)."""
    if host:
        listening = socket.create_server((_LOOPBACK[0], port), backlog=1024)
        port = listening.getsockname()[1]
        options["master_listen_fd"] = listening.detach()  # torch closes it
    return dist.TCPStore(_LOOPBACK[0], port, is_master=host, timeout=timeout, **options)


def _local_rank(env: Mapping[str, str]) -> int:
    """Return LOCAL_RANK. Raise EnvironmentProblem for variables that are no whole numbers."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if "RANK" in env else ():
        if not env.get(name, "").isdigit():
            state = f"is {short(env[name], 40)!r}" if name in env else "is not set"
            raise EnvironmentProblem(
                f"RANK is set in the environment and {name} {state}; a launcher (torchrun, srun) "
                "sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT to whole numbers: unset RANK to "
                "run without one"
            )
    if "RANK" in env and int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        given = f"RANK={env['RANK']} is no rank of WORLD_SIZE={env['WORLD_SIZE']}"
        raise EnvironmentProblem(f"{given}; a launcher counts ranks from 0")
    return int(env["LOCAL_RANK"])


def check_same_versions(store: Any, rank: int, versions: dict[str, Any]) -> None:
    """Raise EnvironmentProblem if this rank's versions differ from those of rank 0.

    Ranks that run different programs hang in a collective or diverge silently.
    """
    if rank == 0:
        store.set("versions", json.dumps(versions))
        return
    if other := environment.differences(json.loads(store.get("versions")), versions):
        found = f"ranks 0 and {rank} ({socket.gethostname()}) have different versions"
        raise EnvironmentProblem(f"{found} ({', '.join(other)}); install the same on every node")


def heartbeat_store(store: Any) -> Any:
    """Return a separate connection to the part of a store that `training/watch.py` uses."""
    own = dist.PrefixStore("watch", store.clone())
    own.set_timeout(timedelta(seconds=10))  # then the host of the store counts as gone
    return own


def host_store() -> Any:
    """Return a store in this process for ranks of this machine; it outlives them."""
    return _local_store(0, timedelta(minutes=5), host=True, wait_for_workers=False)


HOSTED_STORE = {_AGENT_STORE: "True"}  # a launcher with a store sets it, as torchrun's agent does


def is_collective_error(error: BaseException) -> bool:
    """Return whether a collective failed: NCCL's errors have types, gloo's only texts."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and bool(_GLOO.search(str(error)))


def has_joined() -> bool:
    """Return whether this process has joined a process group."""
    return _joined is not None


def leave() -> None:
    """Leave the process group; all ranks call it, at their normal end.

    DeepSpeed keeps references to its groups, and a later training in this process would use them.
    Only its own function drops them (`deepspeed.comm.destroy_process_group`, since 0.19.8).
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    comm = sys.modules.get("deepspeed.comm")
    owner = comm if comm is not None and comm.is_initialized() else dist
    owner.destroy_process_group()


def end(code: int) -> None:
    """End this process at once with this exit code if it has joined others; else do nothing.

    The interpreter's normal exit destroys C++ threads of gloo and DeepSpeed in an order that aborts
    about one CPU rank in thirty (torch 2.13), after all work is done and saved.
    """
    if _joined is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
