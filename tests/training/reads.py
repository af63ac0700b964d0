"""Count what makes the host wait for the device in a step of each stage under each layout.

`python -m tests.training.reads RECIPE OUT`: OUT/reads.json, a list of places for each case. On a
CPU no read waits, but each is visible: as a method of a tensor, or as the operator behind it.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lbr_ds.config import load
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.training.loop import take_step
from lbr_ds.training.session import build_engine, build_session
from tests.training.probe import steps_of

LAYOUTS = ("zero1", "zero2", "zero3")
# (stage, micro-batches at least): overrides
CASES = {
    (1, 1): ["stage1.micro_batch_tokens=4096"],
    (1, 8): ["stage1.micro_batch_tokens=16", "stage1.bag_of_words=0.5"],
    (2, 1): ["stage2.micro_batch_tokens=4096"],
    (2, 8): ["stage2.micro_batch_tokens=16", "stage2.distillation.loss=kl"],
}
_ITEM = torch.ops.aten._local_scalar_dense.default
# Operators whose result has a size that only the device knows.
_SIZES = {
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.repeat_interleave.Tensor,
}
_WHOLE = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func is _ITEM or func in _SIZES or boolean:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The rank's device, which is a CPU here, is passed as a torch.device.
        moved = func is torch.Tensor.to and "cpu" in [a for a in args[1:] if isinstance(a, str)]
        if func in _WHOLE or moved:
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))


def count(act: Callable[[], object]) -> list[str]:
    """Where `act` reads from the device: what, and the innermost place outside of torch."""
    found: list[str] = []

    def note(what: str) -> None:
        stack = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        frame = stack[-1]
        found.append(f"{what} at {'/'.join(Path(frame.filename).parts[-2:])}:{frame.name}")

    with _Operators(note), _Methods(note):
        act()
    return found


def probe(recipe: str, out: Path, world: World) -> None:
    found = {}
    for layout in LAYOUTS:
        for (number, least), overrides in CASES.items():
            named = [f"engine.ds_config={layout}", "stage2.from=backbone", *overrides]
            run = load(recipe, named)
            session = build_session(run, number, build_engine(run, number, world))
            stream = steps_of(run, session, world, 3)
            works = [session.stage.collate(run, session.tokenizer, step) for step in stream]
            assert (len(works[2].micro_batches) == 1) is (least == 1)
            assert len(works[2].micro_batches) >= least
            assert len(works[2].by_source) == 3
            assert number == 1 or works[2].pairs.temperature is not None
            session.feed = iter(works)
            for _ in range(2):  # ZeRO-3 records the order of modules
                take_step(session, 1e-4)
            places = count(functools.partial(take_step, session, 1e-4))
            found[f"{layout} stage {number}, {least}"] = places
    if world.first:
        (out / "reads.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    place = join(timeout_minutes=2)
    probe(sys.argv[1], Path(sys.argv[2]), place)
    leave()
    end(0)
