"""Compare a disturbed run with an undisturbed one, in bits or as a relative error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lbr_ds.runs import checkpoints
from lbr_ds.training.deepspeed.library import read_state

# Keys of a line in metrics.jsonl that depend on the clock and the machine.
_CLOCK = ("_seconds", "_per_second", "memory_gib", "straggler", "slowest_rank")


def differing_bits(ours: Path, theirs: Path) -> int:
    """Count the bits in which the ends of two `RUN/stageN` differ.

    Compared: weights, optimizer states, random states and counters of every rank in the last
    checkpoint, and each step's loss, gradient norm, rate and counts. What only one side has counts
    in full.
    """
    found, wanted = (dict(_everything(folder)) for folder in (ours, theirs))
    return sum(_bits(found.get(key, b""), wanted.get(key, b"")) for key in found | wanted)


def wrong_samples(notes: Path, wanted: Path) -> int:
    """Count the samples that the ranks of `notes` drew differently from `wanted`, or never.

    Both are folders of `Ranks`; a step that was taken again must have drawn the same again. It
    does not matter which rank drew a sample.
    """
    found, right = _samples(notes), _samples(wanted)
    return sum(found.get(place) != right.get(place) for place in found | right)


def steps_not_once(stage: Path, last: int) -> int:
    """Count steps of 1..last that metrics.jsonl lacks or has twice, and lines of other steps."""
    steps = [line["step"] for line in _metrics(stage)]
    wanted = set(range(1, last + 1))
    return len(wanted - set(steps)) + len(steps) - len(set(steps) & wanted)


def largest_relative_error(ours: Path, theirs: Path) -> float:
    """max over the weights' tensors of |a - b| / |b| (2-norms), last checkpoints of two stages."""
    found, wanted = (load_file(_weights(folder)) for folder in (ours, theirs))
    assert found.keys() == wanted.keys()
    return max(
        float((found[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in wanted.items()
    )


def _weights(stage: Path) -> Path:
    return checkpoints(stage)[-1] / "model" / "model.safetensors"


def _metrics(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def _samples(notes: Path) -> dict[tuple[int, str], set[str]]:
    """(step, lane) -> the samples drawn for it, one unless something is wrong."""
    drawn: dict[tuple[int, str], set[str]] = {}
    for path in notes.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            step, lanes = json.loads(line)
            for lane, sample in lanes.items():
                drawn.setdefault((step, lane), set()).add(sample)
    return drawn


def _everything(stage: Path) -> Iterator[tuple[str, bytes]]:
    last = checkpoints(stage)[-1]
    for file in sorted(last.glob("state/**/*.pt")):
        yield from _leaves(read_state(file), file.name)
    yield from _leaves(load_file(_weights(stage)), "weights")
    for line in _metrics(stage):
        kept = {k: v for k, v in line.items() if not k.endswith(_CLOCK)}
        yield from _leaves(kept, f"step {line['step']}")


def _leaves(value: Any, place: str) -> Iterator[tuple[str, bytes]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}.{number}")
    elif isinstance(value, torch.Tensor):
        yield place, value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield place, value.tobytes()
    else:
        yield place, repr(value).encode()  # of a float: shortest text that gives it back exactly


def _bits(a: bytes, b: bytes) -> int:
    length = max(len(a), len(b))
    if a == b:
        return 0
    first, second = (np.frombuffer(x.ljust(length, b"\0"), np.uint8) for x in (a, b))
    return max(1, int(np.unpackbits(first ^ second).sum()))
