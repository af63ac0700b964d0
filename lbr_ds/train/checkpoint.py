"""Checkpoints: written beside, renamed when whole, the newest whole one used, old ones pruned.

RUN/stageN/checkpoints/step-000500/
    state.json   step, stage, ranks, the keys that decide the numbers, the data's hash
    state/       the engine's shards (optimizer, parameters, random states), for resuming
    model/       the weights as a Hugging Face folder, for stage 2, export and evaluation
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lbr_ds.config import RunConfig
from lbr_ds.corpora import overlap
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError
from lbr_ds.runs import checkpoints
from lbr_ds.shards import Manifest
from lbr_ds.train.engine import Engine

_FILE_BYTES = 2 << 30  # a weights file is closed once it holds this much


def save(run: RunConfig, stage: int, step: int, engine: Engine, world: World) -> Path:
    """Save after `step` optimizer steps and prune. All ranks call it."""
    folder = run.run / f"stage{stage}"
    final = folder / "checkpoints" / f"step-{step:06d}"
    part = final.with_suffix(".part")
    if world.first:
        shutil.rmtree(part, ignore_errors=True)
        (part / "model").mkdir(parents=True)
    world.barrier()
    engine.save_state(part, mine=random_states())
    save_model(run, engine, part / "model", world)
    if world.first:
        if isinstance(run.data.folder, Path):  # of data behind a URL eval cannot check overlap
            overlap.copy(run.data.folder, part / "model")
        facts = {
            "step": step, "stage": stage, "world_size": world.size, "zero_stage": engine.stage,
            "samples": step * run.stage(stage).samples_per_step,
            "data": _data(run, stage), "recipe": run.decisive(stage),
        }  # fmt: skip
        (part / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
    world.barrier()
    if world.first:
        _flush(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _flush(final.parent)
        for old in checkpoints(folder)[: -run.every.keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def save_model(run: RunConfig, engine: Engine, folder: Path, world: World) -> None:
    """The whole weights as safetensors, file by file, with config and tokenizer beside them."""
    waiting: dict[str, Tensor] = {}
    where: dict[str, str] = {}

    def close_file() -> None:
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(waiting, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for name, tensor in engine.weights():
        if tensor is None:
            continue
        waiting[name] = tensor
        if sum(t.nbytes for t in waiting.values()) > _FILE_BYTES:
            close_file()
    if not world.first:
        return
    if waiting:
        close_file()
    if len(set(where.values())) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in (run.run / "backbone").iterdir():
        if path.is_file() and path.suffix != ".safetensors" and ".index." not in path.name:
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(engine.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def resume(run: RunConfig, stage: int, engine: Engine, world: World) -> int:
    """Load the newest checkpoint; returns its step, or 0 when there is none.

    Raises CheckpointError when it was made by a recipe that gives other numbers.
    """
    found = checkpoints(run.run / f"stage{stage}")
    if not found:
        return 0
    facts = json.loads((found[-1] / "state.json").read_text())
    if changed := ", ".join(_differences(facts["recipe"], run.decisive(stage))):
        raise CheckpointError(
            f"{found[-1]} was made by another recipe ({changed}); "
            "undo the change, or give a new run folder with run=..."
        )
    data = _data(run, stage)
    if facts["data"] != data:
        raise CheckpointError(
            f"{found[-1]} was trained on data {facts['data'][:12]}, {run.data.folder} now holds "
            f"{data[:12]}; prepare the same data again, or give a new run folder with run=..."
        )
    if facts["world_size"] != world.size:
        raise CheckpointError(
            f"{found[-1]} was saved by {facts['world_size']} ranks and this run has {world.size}; "
            "start it with as many"
        )
    restore_random_states(engine.load_state(found[-1]))
    return int(facts["step"])


def _data(run: RunConfig, stage: int) -> str:
    """The fingerprint of what the stage reads: mined negatives are none of stage 1's business."""
    manifest = Manifest.load(run.data.folder)
    return manifest.prepared if stage == 1 else manifest.fingerprint


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [f"{path[1:]}: {old} -> {new}"]


def random_states() -> dict[str, Any]:
    """This process's random generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(),
              "torch": torch.get_rng_state()}  # fmt: skip
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo `random_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _flush(place: Path) -> None:
    """Make a folder's files and names durable before anything relies on them."""
    for path in [place, *place.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
