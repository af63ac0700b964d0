"""Models for the suite `gpu`: random weights of a known shape, in sizes that fit into the device.

`trained` is an engine of one rank with a recipe for each stage; `plain_torch` is the same module
without an engine. Tokens of a step and activation checkpointing follow from the planner's memory
model (plan/memory.py), so that no step runs out of memory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbr_ds.bench.setting import Setting
from lbr_ds.bench.workload import BOTTLENECK, TINY, config_of, random_model
from lbr_ds.config import RunConfig
from lbr_ds.distributed import join
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.compiled_layers import compile_layers
from lbr_ds.model.embedder import Embedder
from lbr_ds.plan.fit import GPU_FILL, GPU_RESERVE
from lbr_ds.plan.memory import memory_of
from lbr_ds.plan.shape import shape_of_config
from lbr_ds.plan.work import work_of
from lbr_ds.training.deepspeed.engine import Engine, load_layout
from lbr_ds.training.session import build_engine, embedder_maker

log = logging.getLogger(__name__)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYOUT, DTYPE = ("zero3", torch.bfloat16) if ON_GPU else ("zero3_cpu", torch.float32)


@dataclass(frozen=True)
class Sizes:
    """Lengths of the sequences.

    Attributes:
        length: tokens of X and of Y in stage 1.
        text: tokens of a text in stage 2.
    """

    length: int
    text: int

    @property
    def sequence(self) -> int:
        """Tokens of a sequence of stage 1."""
        return 2 * self.length + BOTTLENECK


FULL, QUICK = Sizes(2048, 512), Sizes(16, 16)


@dataclass(frozen=True)
class Step:
    """What one step holds: sequences of stage 1 (or as many tokens of stage 2)."""

    sequences: int
    checkpointing: bool


# In the order of preference. Three sequences fill a GPU; recomputing costs a quarter of the work.
STEPS = (
    *(Step(count, False) for count in (16, 8, 6, 4, 3)),
    *(Step(count, True) for count in (16, 8, 4, 2, 1)),
)


@dataclass(frozen=True)
class Trained:
    """An engine of one rank, the config.json of its model, and a recipe for each stage."""

    config: dict[str, Any]
    engine: Engine
    runs: dict[int, RunConfig]


def sizes(setting: Setting) -> Sizes:
    """Return the lengths of this run."""
    return QUICK if setting.quick else FULL


def config(name: str, setting: Setting) -> dict[str, Any]:
    """Return the config.json of a backbone, or of a tiny one in the short version."""
    return TINY if setting.quick else config_of(name)


def recipe(name: str, number: int, step: Step, folder: Path, lengths: Sizes) -> RunConfig:
    """Return a recipe whose step of stage `number` is one micro-batch of that size."""
    pairs = max(2, step.sequences * lengths.sequence // lengths.text // 2)
    return RunConfig.model_validate(
        {
            "name": "bench",
            "run": folder,
            "model": {
                "backbone": name,
                "max_length": lengths.length + BOTTLENECK if number == 1 else lengths.text,
                "activation_checkpointing": step.checkpointing,
            },
            "bottleneck": {"count": BOTTLENECK},
            "data": {"folder": folder / "data", "sources": [{"path": "none"}]},
            "stage1": {
                "num_steps": 1,
                "max_target_length": lengths.length,
                "samples_per_step": step.sequences,
                "micro_batch_tokens": step.sequences * lengths.sequence,
                "optim": {"lr": 1e-6},
            },
            "stage2": {
                "from": "backbone",
                "num_steps": 1,
                "samples_per_step": pairs,
                "micro_batch_tokens": 2 * pairs * lengths.text,
                "temperature": 0.05,
                "optim": {"lr": 1e-6},
            },
            "engine": {"ds_config": LAYOUT},
        }
    )


def fitting_steps(name: str, number: int, setting: Setting) -> list[Step]:
    """Return the steps of stage `number` that fit into the device, the best one first.

    The last one is tried even if it should not fit.
    """
    if setting.quick:
        return [Step(2, False)]
    shape = config_of(name)
    runs = {step: recipe(name, number, step, Path("bench"), FULL) for step in STEPS}
    fitting = [s for s, run in runs.items() if planned(run, number, shape) <= device_bytes()]
    return fitting or [STEPS[-1]]


def device_bytes() -> float:
    """Return the bytes of the GPU that a plan may fill."""
    return GPU_FILL * torch.cuda.get_device_properties(0).total_memory


def planned(run: RunConfig, number: int, shape: dict[str, Any]) -> int:
    """Return the bytes that the planner expects a step under ZeRO-3 to need on one GPU."""
    memory = memory_of(
        shape_of_config(shape, run.model.backbone),
        load_layout("zero3"),
        work_of(run, number, 1),
        world=1,
        checkpointing=run.model.checkpoints_activations,
    )
    return memory.peak + GPU_RESERVE


@contextmanager
def trained(name: str, checkpointing: bool, setting: Setting) -> Iterator[Trained]:
    """Build a ZeRO-3 engine of one rank on random weights of a backbone's shape."""
    shape = config(name, setting)
    with tempfile.TemporaryDirectory() as place:
        run = _stored(name, shape, checkpointing, Path(place), setting)
        engine = build_engine(run, 1, join(10))
        runs = {
            number: recipe(name, number, Step(1, checkpointing), Path(place), sizes(setting))
            for number in (1, 2)
        }
        try:
            yield Trained(shape, engine, runs)
        finally:
            engine.engine.destroy()


@contextmanager
def plain_torch(name: str, checkpointing: bool, setting: Setting) -> Iterator[Embedder]:
    """Build the module that an engine would wrap, compiled as it would, on random weights."""
    with tempfile.TemporaryDirectory() as place:
        run = _stored(name, config(name, setting), checkpointing, Path(place), setting)
        model = embedder_maker(run)(DTYPE).to(DEVICE)
    weights = random_model(config(name, setting), DEVICE, DTYPE)
    model.backbone.load_state_dict(weights.state_dict())
    if ON_GPU:  # as model.compile=auto does
        compile_layers(model.backbone.base_model, "inductor")
    yield model


def _stored(
    name: str, shape: dict[str, Any], checkpointing: bool, folder: Path, setting: Setting
) -> RunConfig:
    """Write a prepared backbone with random weights into a run folder and return its recipe."""
    random_model(shape, DEVICE, DTYPE).save_pretrained(folder / "backbone")
    Card(BOTTLENECK, 32768, "last", "causal").save(folder / "backbone")
    return recipe(name, 1, Step(1, checkpointing), folder, sizes(setting))
