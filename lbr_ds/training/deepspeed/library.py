"""Import and configure DeepSpeed.

The modules of this folder take `deepspeed` from here; no module outside of it imports DeepSpeed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from lbr_ds.errors import short
from lbr_ds.training.checkpoint.snapshot import ENUM_MEMBER, HostMemory

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.runtime import compiler
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

for name in ("DeepSpeed", "deepspeed"):
    logging.getLogger(name).setLevel(logging.WARNING)
    # It reports gradients that are not finite for every refused update; the guard says why.
    logging.getLogger(name).addFilter(lambda record: "OVERFLOW" not in record.getMessage())
# What a checkpoint holds beside tensors and plain values; fragment_address: ZeRO-1 and 2.
_CLASSES = [LossScaler, ZeroStageEnum, fragment_address, ENUM_MEMBER]
# On CPU ranks DeepSpeed would compile a shared-memory all-reduce that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without `torch.compile`, which its functions ask for.

    DeepSpeed (0.19) imports Muon for every engine, to compare the optimizer's type. The decorators
    then import torch's compiler, more than a second of a rank's start, and no stage uses Muon.
    """
    compile_function = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_function


_import_muon()


def read_state(file: str | Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Read one file of a checkpoint's state/ without running any code that it may hold.

    Raises:
        UnpicklingError: The file needs other classes than those of a checkpoint.
    """
    with torch.serialization.safe_globals(_CLASSES):
        try:
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
        except UnpicklingError as error:  # torch's advice is to read it with weights_only=False
            reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            raise UnpicklingError(f"{Path(file).name}: {reason or short(error)}") from None


class StateCollector(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, which keeps the state to save instead of writing it."""

    def __init__(self, memory: HostMemory | None) -> None:
        super().__init__()
        self.memory = memory
        self.files: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: `checkpoint/saver.py` writes the files and makes their folders."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep the state, or a copy of it in `memory`, under its file's name."""
        copied = self.memory.copy(path, state_dict) if self.memory else state_dict
        self.files[Path(path).as_posix()] = copied

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file as data only; DeepSpeed's own method would unpickle anything."""
        return read_state(path, map_location)


def gathered(*parameters: nn.Parameter, writer: int | None = None) -> Any:
    """Return a context in which sharded parameters are whole, and changes of `writer` are kept."""
    if not hasattr(parameters[0], "ds_id"):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=writer)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard standard output: DeepSpeed prints to it at any log level, and ours is for results."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
