"""Settle the recipe's keys that are `auto` when a stage starts (plan/auto.py says how).

What was chosen is recorded in RUN/stageN/auto.json. A start with the same recipe on as many ranks
takes it from there, so a resumed run computes exactly what the run would have computed. On another
number of ranks the keys are settled anew, but the layout keeps the ZeRO stage and the precision of
the checkpoint, without which its state cannot be loaded.
"""

from __future__ import annotations

import gc
import json
import logging
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lbr_ds.config import RunConfig
from lbr_ds.config import ds_config as layouts
from lbr_ds.config.ds_config import Layout
from lbr_ds.config.training import check_world
from lbr_ds.distributed import World
from lbr_ds.errors import ConfigError
from lbr_ds.plan import auto
from lbr_ds.plan.fit import GIB
from lbr_ds.plan.gpus import Cluster, Gpu, find_gpu, gpu_of_device
from lbr_ds.plan.shape import Shape, prepared_shape
from lbr_ds.system import environment
from lbr_ds.system.atomic import write_json
from lbr_ds.system.failures import is_out_of_memory
from lbr_ds.system.yaml_json import read_json
from lbr_ds.training.deepspeed.engine import load_layout
from lbr_ds.training.stages import rehearse

if TYPE_CHECKING:
    from lbr_ds.training.session import Session

log = logging.getLogger(__name__)
NAME = "auto.json"
_UNKNOWN_GPU = "a100"  # whose speed is assumed for a GPU that gpus.yaml lacks
_WAIT_SECONDS = 60.0  # for the other ranks to run out of memory as well


def settle(
    run: RunConfig,
    number: int,
    world: World,
    checkpoint: Path | None = None,
    *,
    record: bool = True,
) -> tuple[RunConfig, Layout]:
    """Return the recipe with values for the keys that are `auto`, and the layout.

    All ranks call it and get the same, chosen for the rank with the least memory.

    Args:
        run: The recipe.
        number: 1 or 2.
        world: This rank's place.
        checkpoint: The checkpoint that the stage resumes from.
        record: Whether the run folder's record is used and written.

    Raises:
        ConfigError: The ds_config cannot be used, or the ranks cannot share a step.
    """
    if not auto.is_open(run, number):
        return run, load_layout(run.engine.ds_config)
    check_world(run.stage(number).samples_per_step, world.size)
    cluster, path = cluster_of(run, world), run.run / f"stage{number}" / NAME
    found: tuple[auto.Choice, str] | None = None
    if world.first:
        found = (_recorded(path, run, number, world) if record else None) or _chosen(
            run, number, cluster, checkpoint
        )
    choice, line = world.share(found)
    log.info("%s", line)
    if world.first and record:
        _write(path, run, number, world, choice, line)
    run = auto.settled(run, number, choice)
    return run, layouts.load(run.engine.ds_config)


def cluster_of(run: RunConfig, world: World) -> Cluster:
    """Return what the ranks run on, with the memory of the rank that has the least."""
    hosts = world.collect(socket.gethostname())
    per_node = max(hosts.count(host) for host in hosts)
    gpu = device_of(run, per_node)
    least = -world.max(-gpu.memory_gib)[0]
    gpu = gpu.model_copy(update={"memory_gib": least})
    return Cluster(-(-world.size // per_node), per_node, gpu)


def device_of(run: RunConfig | None, per_node: int) -> Gpu:
    """Return what one of `per_node` ranks on this machine runs on, with its memory.

    The recipe's `engine.memory_gib`, if there is one, takes the place of the memory that is found.
    """
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = properties.total_memory
        gpu = gpu_of_device(properties.name) or find_gpu(_UNKNOWN_GPU)
    else:
        memory, gpu = environment.free_host_memory() // per_node, find_gpu("cpu")
    given = run.engine.memory_gib if run else None
    return gpu.model_copy(update={"memory_gib": given or memory / GIB})


def _chosen(
    run: RunConfig, number: int, cluster: Cluster, checkpoint: Path | None
) -> tuple[auto.Choice, str]:
    """Return what the plan chooses, and the line that says why."""
    kept: dict[str, Any] = {}
    if checkpoint is not None and run.engine.ds_config == auto.AUTO:
        facts = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        kept = {
            "zero_stage": facts["zero_stage"],
            "width": 2 if "bfloat16" in facts["dtype"] else 4,
        }
    try:
        shape: Shape = prepared_shape(run)
    except ConfigError as error:
        choice = auto.unplanned(gpu=not cluster.gpu.cpu, **kept)
        return choice, f"auto: {auto.values(run, number, choice)}, without a plan: {error}"
    choice = auto.choose(run, number, shape, cluster, **kept)
    line = auto.describe(run, number, choice, cluster)
    if kept and layouts.load(choice.ds_config).stage == kept["zero_stage"]:
        line += f"; ZeRO stage {kept['zero_stage']} is that of {checkpoint}"
    return choice, line


def settings_of(run: RunConfig, number: int, world: World) -> dict[str, Any]:
    """Return what a record must agree with to be used again."""
    return {"world_size": world.size, "recipe": run.result_settings(number)}


def read_record(path: Path, what: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier start recorded with these settings; None without such a record."""
    if not path.is_file():
        return None
    record = read_json(path, f"the record of {what}", ConfigError, "remove it")
    return record if record.get("settings") == settings else None


def write_record(path: Path, made: dict[str, Any], settings: dict[str, Any]) -> None:
    """Record what was chosen with these settings, for a resume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**made, "settings": settings}, indent=2)


def _recorded(
    path: Path, run: RunConfig, number: int, world: World
) -> tuple[auto.Choice, str] | None:
    """Return the choice of an earlier start with these settings; None without one."""
    record = read_record(path, "automatic values", settings_of(run, number, world))
    if record is None:
        return None
    choice = auto.Choice(**record["choice"])
    return choice, f"auto: {auto.values(run, number, choice)}, as this stage started ({path})"


def _write(
    path: Path, run: RunConfig, number: int, world: World, choice: auto.Choice, line: str
) -> None:
    made = {"choice": asdict(choice), "why": line}
    write_record(path, made, settings_of(run, number, world))


def rehearsed(session: Session, run: RunConfig) -> bool:
    """Run the largest micro-batch once; see `stages.rehearse`.

    Args:
        session: The session at its start.
        run: The recipe as it was loaded.

    Returns:
        False: all ranks ran out of memory, and `halve` may help; the session cannot be used.
    """
    try:
        rehearse(session)
    except Exception as error:
        if not is_out_of_memory(error) or not may_halve(run, session.stage.number):
            raise
        if not everyone_ran_out(session.world):
            raise
        return False
    return True


def may_halve(run: RunConfig, number: int) -> bool:
    """Return whether the recipe's micro-batch is `auto` and has not been halved yet."""
    path = run.run / f"stage{number}" / NAME
    if run.stage(number).micro_batch_tokens != auto.AUTO or not path.is_file():
        return False
    return not read_json(path, "the record of automatic values", ConfigError, "remove it")[
        "choice"
    ].get("halved")


def everyone_ran_out(world: World) -> bool:
    """Return whether all ranks call this within a minute of each other, without a collective.

    Then no rank waits in a collective that others have left.
    """
    if world.store is None:
        return True
    deadline, count = time.monotonic() + _WAIT_SECONDS, world.store.add("out of memory", 1)
    while count < world.size and time.monotonic() < deadline:
        time.sleep(0.1)
        count = world.store.add("out of memory", 0)
    return bool(count >= world.size)


def halve(run: RunConfig, number: int, world: World) -> None:
    """Record half of the automatic micro-batch for the next start. All ranks call it.

    Args:
        run: The recipe as it was loaded.
        number: 1 or 2.
        world: This rank's place.
    """
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    path = run.run / f"stage{number}" / NAME
    if world.first:
        record = read_json(path, "the record of automatic values", ConfigError, "remove it")
        choice = auto.halved(auto.Choice(**record["choice"]))
        line = (
            f"auto: out of memory with stage{number}.micro_batch_tokens="
            f"{record['choice']['micro_batch_tokens']}; starting again with "
            f"{choice.micro_batch_tokens}"
        )
        log.warning("%s", line)
        _write(path, run, number, world, choice, line)
    world.barrier()
