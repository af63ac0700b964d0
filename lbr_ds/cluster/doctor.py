"""Check that this node is ready for a run, before any rank starts: `lbr-ds doctor RECIPE`.

    check_node(NodeTask(run, stage=1, nodes=4, ranks=8))

One process per node, which waits for no other node. It checks what would end the run later or slow
down all its ranks: the data, room for checkpoints, host memory, and the GPUs (gpu_check.py).
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lbr_ds import runs
from lbr_ds.cluster import gpu_check
from lbr_ds.config import STAGES, RunConfig
from lbr_ds.config.ds_config import Layout
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, LbrError
from lbr_ds.model.files import FILE_BYTES
from lbr_ds.plan import Cluster, auto, find_gpu, predict
from lbr_ds.plan.shape import Shape, prepared_shape
from lbr_ds.plan.work import num_steps
from lbr_ds.shards import Manifest, ShardFile
from lbr_ds.system.environment import free_host_memory
from lbr_ds.training.auto import device_of
from lbr_ds.training.deepspeed.engine import load_layout

TIMEOUT_SECONDS = 600  # of one check; after that a file system or a GPU hangs
_GIB = 1 << 30


@dataclass(frozen=True)
class NodeTask:
    """What each of `nodes` nodes will run: `ranks` ranks of a stage of the run."""

    run: RunConfig
    stage: int
    nodes: int
    ranks: int

    @property
    def layout(self) -> Layout:
        """The ds_config that training will use on this node."""
        name, shape = self.run.engine.ds_config, self.shape
        if name == auto.AUTO and shape is not None:
            cluster = Cluster(self.nodes, self.ranks, device_of(self.run, self.ranks))
            name = auto.choose(self.run, self.stage, shape, cluster).ds_config
        return load_layout(name)

    @property
    def shape(self) -> Shape | None:
        """The shape of the backbone; None if the planner does not know it."""
        try:
            return prepared_shape(self.run)
        except ConfigError:
            return None


def check_node(task: NodeTask) -> str:
    """Run all checks.

    Returns:
        One line that begins with the host's name and says what was found.

    Raises:
        LbrError: one line with all faults, of the class of the first one. A check that gets no
            answer within TIMEOUT_SECONDS ends the process with such a line and exit code 6.
    """
    host = host_name()
    results: list[str] = []
    faults: list[LbrError] = []
    checks: dict[str, Callable[[NodeTask], str]] = {
        "data.folder": check_data,
        "run": check_run_folder,
        "host memory": check_host_memory,
        "GPUs": check_gpus,
    }
    for what, check in checks.items():
        with _time_limit(host, what):
            try:
                results.append(check(task))
            except LbrError as error:
                faults.append(error)
            except OSError as error:  # a stale mount, missing permissions
                line = f"{what}: {error.filename}: {error.strerror}; repair it, or leave the node"
                faults.append(EnvironmentProblem(f"{line} out with sbatch --exclude={host}"))
    if faults:
        lines = dict.fromkeys(str(fault) for fault in faults)  # two checks may find the same fault
        raise type(faults[0])(f"{host}: {'; '.join(lines)}")
    return f"{host} is ready: {'; '.join(results)}"


def host_name() -> str:
    """Return this host's name in SLURM, which --exclude accepts; outside of SLURM its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def _time_limit(host: str, what: str) -> Iterator[None]:
    """End the process if the body takes longer than TIMEOUT_SECONDS."""

    def give_up() -> None:
        line = f"{host}: the check of {what} did not end within {TIMEOUT_SECONDS} s"
        print(
            f"lbr-ds: error: {line}; leave the node out with sbatch --exclude={host}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EnvironmentProblem.exit_code)

    timer = threading.Timer(TIMEOUT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_data(task: NodeTask) -> str:
    """Check that the stage's shards are complete and that the first one can be read.

    Behind a URL the first shard is fetched, and the cache must have room for the others. Shards
    that data.on_error=skip would pass over are no fault.

    Raises:
        DataError: a shard is missing, truncated or not readable.
        EnvironmentProblem: the cache has no room.
    """
    part, split = task.run.data, STAGES[task.stage].split
    manifest = Manifest.load(part.folder, part.cache_gib)
    shards = manifest.shards(split)
    if part.on_error == "strict":
        manifest.check(split)
        for first in shards[:1]:
            try:
                with manifest.file(first).open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise DataError(
                    f"{manifest.where(first)}: cannot be read ({error.strerror}); "
                    "check its permissions and the disk"
                ) from None
    if manifest.remote is not None:
        _check_room_in_cache(manifest, shards, int(part.cache_gib * _GIB))
    return f"{len(shards)} shard(s) of {split}"


def _check_room_in_cache(manifest: Manifest, shards: list[ShardFile], limit: int) -> None:
    cached = {p.stem: p.stat().st_size for p in manifest.folder.glob("*.tar")}
    missing = sum(shard.bytes for shard in shards if shard.sha256 not in cached)
    need = min(missing, max(0, limit - sum(cached.values())))
    if (free := shutil.disk_usage(_existing(manifest.folder)).free) < need:
        raise EnvironmentProblem(
            f"{manifest.folder}: {_size(free)} free, {_size(need)} of shards are still to be "
            "fetched; name a folder on a larger disk in LBR_DS_CACHE, or lower data.cache_gib"
        )


def check_run_folder(task: NodeTask) -> str:
    """Check that the run folder is writable and has room for the checkpoints to come.

    Quotas are not seen.

    Raises:
        EnvironmentProblem: it is not, or has not.
    """
    run, place = task.run, _existing(task.run.run)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise EnvironmentProblem(
            f"run={run.run}: {place} cannot be written ({error.strerror}); repair that, or give "
            "another run folder with run=..."
        ) from None
    free, shape = shutil.disk_usage(place).free, task.shape
    if shape is None:
        return f"{_size(free)} free in {place}, not checked since the backbone is not known"
    each, count = checkpoint_bytes(shape, task.layout), most_checkpoints(run, task.stage)
    # Frozen weights are one file in all checkpoints of a process; a resumed one writes it again.
    linked = max(0, count - 2) * (shape.total - shape.trainable) * task.layout.width
    present = _bytes_on_disk(runs.saved(run.run / STAGES[task.stage].folder))
    if free < (need := count * each - linked - present):
        raise EnvironmentProblem(
            f"run={run.run}: {_size(free)} free, {_size(need)} needed for up to {count} "
            f"checkpoints of {_size(each)} at a time; make room, lower every.keep, or give another "
            "run folder"
        )
    return f"{count} checkpoint(s) of {_size(each)} fit into {place}"


def checkpoint_bytes(shape: Shape, layout: Layout) -> int:
    """Return the bytes of one checkpoint: the optimizer's weights and moments, and the model.

    Below ZeRO-3 the state also holds the trainable parameters. With adapters the frozen weights are
    stored beside the merged model.
    """
    state = layout.master_width + 2 * layout.moment_width + layout.width * (layout.stage < 3)
    frozen = shape.total - shape.trainable
    return shape.trainable * state + (2 * frozen or shape.total) * layout.width


def most_checkpoints(run: RunConfig, stage: int) -> int:
    """Return the largest number of a stage's checkpoints on disk, with the one being written."""
    every, steps = run.every, num_steps(run, stage, None)
    count = every.keep + 1 + run.keeps_best(stage)
    if steps is None:
        return count
    if every.keep_every is not None:
        count += steps // math.lcm(every.keep_every, every.save)
    return min(count, -(-steps // every.save))


def check_host_memory(task: NodeTask) -> str:
    """Check the host memory that can be predicted; processes, libraries and caches come on top.

    Counted are: what is offloaded; at a save the node's share of the weights, give or take a file,
    and with every.save_async a copy of its share of the optimizer; at the start, below ZeRO-3, a
    whole model on each rank; on CPU ranks also what a GPU would hold.

    Raises:
        EnvironmentProblem: there is less than that.
        ConfigError: the ranks cannot share a step.
    """
    have, shape, layout = free_host_memory(), task.shape, task.layout
    if shape is None:
        return f"{_size(have)} of host memory, not checked"
    # Host memory does not depend on the kind of GPU.
    cluster = Cluster(task.nodes, task.ranks, find_gpu("h100"))
    planned = predict(shape, layout, task.run, cluster, task.stage)
    whole = shape.total * layout.width
    offloaded = {"offloaded": planned["host_gib_per_node"] * _GIB}
    written = min(whole, whole / task.nodes + FILE_BYTES)
    start, save = dict(offloaded), {**offloaded, "weights at a save": written}
    if layout.stage < 3:
        start["a whole model per rank at the start"] = task.ranks * whole
    if task.run.every.save_async:
        states = checkpoint_bytes(shape, layout) - whole
        save["a copy for saving in the background"] = states / task.nodes
    if not torch.cuda.is_available():
        save["CPU ranks"] = task.ranks * sum(planned["gpu_gib"]["states"].values()) * _GIB
    parts = max(start, save, key=lambda parts: sum(parts.values()))
    need = sum(parts.values())
    if have < need:
        listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
        raise EnvironmentProblem(
            f"host memory: {_size(have)} available, {_size(need)} needed at least ({listed}); "
            "request more (sbatch --mem=0) or more nodes, or set every.save_async=false"
        )
    return f"{_size(need)} of {_size(have)} host memory"


def check_gpus(task: NodeTask) -> str:
    """Check the GPUs, or without one the processor, by a matrix product.

    Raises:
        EnvironmentProblem: GPUs are missing, in use, faulty or slow.
    """
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    promised = int(given) if given.isdigit() else 0
    return gpu_check.check(gpu_check.probe(), promised=promised, ranks=task.ranks, host=host_name())


def _existing(place: Path) -> Path:
    """Return the nearest folder that exists."""
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _bytes_on_disk(checkpoints: list[Path]) -> int:
    """Return the bytes on disk; a file with several names counts once."""
    files = [p.stat() for folder in checkpoints for p in folder.rglob("*") if p.is_file()]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


def _size(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.1f} MiB"
