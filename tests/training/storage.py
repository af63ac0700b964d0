"""Saves on two ranks: slow or full disks, many files; `python -m tests.training.storage FILE`."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from lbr_ds.config import RunConfig, load
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.errors import CheckpointError
from lbr_ds.runs import fault, saved
from lbr_ds.training.checkpoint import saver as saving
from lbr_ds.training.checkpoint.resume import find_checkpoint, load_checkpoint
from lbr_ds.training.checkpoint.saver import Saver
from lbr_ds.training.deepspeed.engine import Engine
from lbr_ds.training.session import build_engine


def failing_save(run: RunConfig, engine: Engine, world: World, code: int, culprit: int) -> None:
    """All ranks get the same error, nothing is left, and the checkpoints before it stand."""
    before = saved(run.run / "stage1")

    def fail(state: Any, path: Path) -> None:
        if world.rank == culprit:
            raise OSError(code, os.strerror(code))
        save_tensors(state, path)

    save_tensors, saving.save_tensors = saving.save_tensors, fail
    message = ""
    try:
        with Saver(run, 1, engine) as saver:
            saver.save(9, {})
            saver.finish()
    except CheckpointError as error:
        message = str(error)
    finally:
        saving.save_tensors = save_tensors
    expected = f"rank {culprit} cannot write the checkpoint: {os.strerror(code)}"
    assert expected in message, message
    assert world.share(message) == message
    world.barrier()
    assert saved(run.run / "stage1") == before
    assert not list((run.run / "stage1/checkpoints").glob("*.part"))
    assert not any(fault(path) for path in before)
    world.barrier()


def many_files(run: RunConfig, engine: Engine, world: World) -> None:
    """Weights in several files, each rank holding and writing its own: the same tensors."""
    (whole,), final = saved(run.run / "stage1")[-1:], run.run / "stage1/checkpoints/step-000008"
    held = []

    def note(own: Any, read: Any, folder: Path) -> None:
        held.append({name for names in own.values() for name in names})
        save_files(own, read, folder)

    save_files, saving.save_files = saving.save_files, note
    with (
        mock.patch("lbr_ds.model.files.FILE_BYTES", 20_000),
        Saver(run, 1, engine) as saver,
    ):
        saver.save(8, {})
    saving.save_files = save_files
    assert fault(final) == ""
    assert len(list((final / "model").glob("*.safetensors"))) > 2
    models = [AutoModelForCausalLM.from_pretrained(path / "model") for path in (whole, final)]
    wanted, found = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    (mine,) = held
    assert 0 < len(mine) < len(wanted)
    assert world.sum(len(mine)) == [len(wanted)]
    world.barrier()


def slow_save(run: RunConfig, engine: Engine, world: World) -> None:
    """While one rank's disk dawdles there is no checkpoint; what is saved is of the save's time."""
    go, final = threading.Event(), run.run / "stage1/checkpoints/step-000009"

    def dawdle(state: Any, path: Path) -> None:
        if world.rank == 1:
            go.wait()
        save_tensors(state, path)

    save_tensors, saving.save_tensors = saving.save_tensors, dawdle
    with Saver(run, 1, engine) as saver:
        saver.save(9, {"skipped": 3})
        for parameter in engine.optimizer.fp32_partitioned_groups_flat:
            parameter.data.zero_()  # the next steps must not reach what is being written
        for _ in range(3):
            saver.poll()
        assert not final.exists()
        world.barrier()
        go.set()
    saving.save_tensors = save_tensors
    assert fault(final) == ""
    name = f"state/ranks/zero_pp_rank_{world.rank}_mp_rank_00_optim_states.pt"
    theirs, ours = (
        torch.load(path / name, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
        for path in saved(run.run / "stage1")[-2:]
    )
    assert float(ours[0].abs().sum()) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    later, at_once = (load(sys.argv[1], [f"every.save_async={on}"]) for on in ("true", "false"))
    model = build_engine(later, 1, place)
    found = find_checkpoint(later, 1, place)
    load_checkpoint(found, model, place)
    failing_save(later, model, place, errno.ENOSPC, culprit=1)
    failing_save(later, model, place, errno.EDQUOT, culprit=0)
    failing_save(at_once, model, place, errno.EROFS, culprit=1)
    many_files(later, model, place)
    slow_save(later, model, place)
    leave()
    end(0)
