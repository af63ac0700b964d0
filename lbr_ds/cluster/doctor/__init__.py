"""Can this host do its part of a run? Asked before any rank starts: `lbr-ds doctor RECIPE`.

    examine(Duty(run, stage=1, nodes=4, ranks=8))

One process a node, which waits for no other node. It looks at what would end the run later or slow
all its ranks down: the data, room for checkpoints, host memory, and the GPUs (gpus.py).
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
from lbr_ds.cluster.doctor import gpus
from lbr_ds.cluster.plan import Cluster, find_gpu, predict
from lbr_ds.cluster.plan.shape import Shape, find_shape, with_adapters
from lbr_ds.cluster.plan.work import num_steps
from lbr_ds.config import STAGES, RunConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.config.ds_config import Layout
from lbr_ds.errors import ConfigError, DataError, EnvironmentProblem, LbrError
from lbr_ds.model.files import FILE_BYTES
from lbr_ds.shards import Manifest, ShardFile
from lbr_ds.system.environment import free_host_memory

__all__ = ["Duty", "examine"]
SECONDS = 600  # that one question may take: after that a file system or a GPU hangs
_GIB = 1 << 30


@dataclass(frozen=True)
class Duty:
    """What each of `nodes` nodes is to do: `ranks` ranks of a stage of the run."""

    run: RunConfig
    stage: int
    nodes: int
    ranks: int

    @property
    def layout(self) -> Layout:
        """The ds_config that training will take here. Raises ConfigError."""
        name = layouts.resolve_name(self.run.engine.ds_config, gpu=torch.cuda.is_available())
        return layouts.load(name)

    @property
    def shape(self) -> Shape | None:
        """The backbone's, None for one that the plan does not know."""
        run, prepared = self.run, self.run.run / "backbone" / "config.json"
        rows = run.bottleneck.count
        there = (0, prepared) if prepared.is_file() else (rows, None)  # they are in it
        try:
            shape = find_shape(run.model, *there)
        except ConfigError:
            return None
        return with_adapters(shape, run.lora, rows)


def examine(duty: Duty) -> str:
    """What was found, in one line that begins with the host's name.

    Raises LbrError, of the first fault's class, with all faults in one such line. A question that
    gets no answer within SECONDS ends the process with such a line and exit code 6.
    """
    host = host_name()
    found: list[str] = []
    faults: list[LbrError] = []
    questions: dict[str, Callable[[Duty], str]] = {
        "data.folder": data,
        "run": folder,
        "host memory": memory,
        "GPUs": processors,
    }
    for what, ask in questions.items():
        with _watched(host, what):
            try:
                found.append(ask(duty))
            except LbrError as error:
                faults.append(error)
            except OSError as error:  # a stale mount, no right to look
                line = f"{what}: {error.filename}: {error.strerror}; mend it, or leave the node out"
                faults.append(EnvironmentProblem(f"{line} with sbatch --exclude={host}"))
    if faults:
        told = dict.fromkeys(str(fault) for fault in faults)  # two questions may meet the same one
        raise type(faults[0])(f"{host}: {'; '.join(told)}")
    return f"{host} is fit: {'; '.join(found)}"


def host_name() -> str:
    """As SLURM calls this host, so that --exclude takes it; else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def _watched(host: str, what: str) -> Iterator[None]:
    """End the process when what is inside takes longer than SECONDS."""

    def give_up() -> None:
        line = f"{host}: {what}: no answer within {SECONDS} s, something hangs there"
        print(
            f"lbr-ds: error: {line}; leave the node out with sbatch --exclude={host}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EnvironmentProblem.exit_code)

    timer = threading.Timer(SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def data(duty: Duty) -> str:
    """Shards of the stage that this host reads: all there in full size, the first one readable.

    Of a URL the first is fetched, and the cache must have room for the others. What
    data.on_error=skip would pass over is no fault. Raises DataError, EnvironmentProblem.
    """
    part, split = duty.run.data, STAGES[duty.stage].split
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
                    "look at its rights and at the disk"
                ) from None
    if manifest.remote is not None:
        _room_in_cache(manifest, shards, int(part.cache_gib * _GIB))
    return f"{len(shards)} shard(s) of {split}"


def _room_in_cache(manifest: Manifest, shards: list[ShardFile], limit: int) -> None:
    cached = {p.stem: p.stat().st_size for p in manifest.folder.glob("*.tar")}
    missing = sum(shard.bytes for shard in shards if shard.sha256 not in cached)
    need = min(missing, max(0, limit - sum(cached.values())))
    if (free := shutil.disk_usage(_existing(manifest.folder)).free) < need:
        raise EnvironmentProblem(
            f"{manifest.folder}: {_gib(free)} free, {_gib(need)} of shards are still to come; name "
            "a folder on a larger disk in LBR_DS_CACHE, or lower data.cache_gib"
        )


def folder(duty: Duty) -> str:
    """The run folder can be written here and has room for the checkpoints that are still to come.

    Raises EnvironmentProblem. Quotas are not seen.
    """
    run, place = duty.run, _existing(duty.run.run)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise EnvironmentProblem(
            f"run={run.run}: {place} cannot be written ({error.strerror}); mend that, or give "
            "another run folder with run=..."
        ) from None
    free, shape = shutil.disk_usage(place).free, duty.shape
    if shape is None:
        return f"{_gib(free)} free in {place}, which is not judged: the backbone is not known"
    each, count = checkpoint_bytes(shape, duty.layout), most_checkpoints(run, duty.stage)
    # What lies frozen is one file in all that a process saves: twice when another goes on.
    linked = max(0, count - 2) * (shape.total - shape.trainable) * duty.layout.width
    there = _size(runs.saved(run.run / f"stage{duty.stage}"))
    if free < (need := count * each - linked - there):
        raise EnvironmentProblem(
            f"run={run.run}: {_gib(free)} free, {_gib(need)} needed for up to {count} checkpoints "
            f"of {_gib(each)} at a time; make room, lower every.keep, or give another run folder"
        )
    return f"{count} checkpoint(s) of {_gib(each)} fit into {place}"


def checkpoint_bytes(shape: Shape, layout: Layout) -> int:
    """Bytes of one checkpoint: the optimizer's weights and moments, and the model for export.

    Below ZeRO-3 the parameters that learn are also in the state, as they are in training; what lies
    frozen under adapters is kept as it is, beside the merged model.
    """
    state = layout.master_width + 2 * layout.moment_width + layout.width * (layout.stage < 3)
    frozen = shape.total - shape.trainable
    return shape.trainable * state + (2 * frozen or shape.total) * layout.width


def most_checkpoints(run: RunConfig, stage: int) -> int:
    """How many of a stage lie there at once: those that stay, and the one being written."""
    every, steps = run.every, num_steps(run, stage, None)
    count = every.keep + 1 + (stage == 1 and run.stage2.start_from == "best")
    if steps is None:
        return count
    if every.keep_every is not None:
        count += steps // math.lcm(every.keep_every, every.save)
    return min(count, -(-steps // every.save))


def memory(duty: Duty) -> str:
    """Host memory for what arithmetic knows of; processes, libraries and caches come on top.

    What is offloaded; at a save the node's share of the weights, a file more or less, and with
    every.save_async a copy of its share of the optimizer; at the start, below ZeRO-3, a whole model
    on each rank. On CPU ranks also what else would stay on a GPU.
    Raises EnvironmentProblem, and ConfigError for a step that so many ranks cannot share.
    """
    have, shape, layout = free_host_memory(), duty.shape, duty.layout
    if shape is None:
        return f"{_gib(have)} of host memory, which is not judged"
    # The kind of GPU matters to time and to what fits, not to what is asked here.
    cluster = Cluster(duty.nodes, duty.ranks, find_gpu("h100"))
    planned = predict(shape, layout, duty.run, cluster, duty.stage)
    whole = shape.total * layout.width
    offloaded = {"offloaded": planned["host_gib_per_node"] * _GIB}
    written = min(whole, whole / duty.nodes + FILE_BYTES)
    start, save = dict(offloaded), {**offloaded, "weights at a save": written}
    if layout.stage < 3:
        start["a whole model a rank at the start"] = duty.ranks * whole
    if duty.run.every.save_async:
        states = checkpoint_bytes(shape, layout) - whole
        save["a copy for saving in the background"] = states / duty.nodes
    if not torch.cuda.is_available():
        save["CPU ranks"] = duty.ranks * sum(planned["gpu_gib"]["states"].values()) * _GIB
    parts = max(start, save, key=lambda parts: sum(parts.values()))
    need = sum(parts.values())
    if have < need:
        told = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
        raise EnvironmentProblem(
            f"host memory: {_gib(have)} to be had, {_gib(need)} needed at least ({told}); ask for "
            "more (sbatch --mem=0) or more nodes, or set every.save_async=false"
        )
    return f"{_gib(need)} of {_gib(have)} host memory"


def processors(duty: Duty) -> str:
    """The GPUs, or without one the processor, by a product. Raises EnvironmentProblem."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    promised = int(given) if given.isdigit() else 0
    return gpus.judge(gpus.look(), promised=promised, ranks=duty.ranks, host=host_name())


def _existing(place: Path) -> Path:
    """The nearest folder that is there."""
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _size(checkpoints: list[Path]) -> int:
    """Bytes on the disk, of a file with several names once."""
    files = [p.stat() for folder in checkpoints for p in folder.rglob("*") if p.is_file()]
    return sum({(found.st_dev, found.st_ino): found.st_size for found in files}.values())


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.1f} MiB"
