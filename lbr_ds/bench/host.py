"""Suite `host`: the engine's overhead on the host, over plain torch.

A GPU waits for the host wherever Python takes longer to start a layer than the GPU to compute it.
This is measured without a GPU too: the model has many layers that are so narrow that their
arithmetic takes nearly no time, on one rank, one thread and one short text in bf16.

zeroN_step: a step under a shipped ds_config over the same in plain torch (fp32 masters, fused
AdamW, clipping). zeroN_micro_batch: forward and backward of a micro-batch that is not the step's
last over the same in plain torch, where gradients add up in bf16.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, pack
from lbr_ds.bench.measure import Comparison, Row, Target
from lbr_ds.bench.setting import Setting
from lbr_ds.bench.workload import BOTTLENECK, embedder, ib, random_model
from lbr_ds.cluster.device import clock
from lbr_ds.config import OptimConfig
from lbr_ds.config.ds_config import Layout
from lbr_ds.distributed import join
from lbr_ds.model.bottleneck import Card
from lbr_ds.model.embedder import Embedder, build_embedder
from lbr_ds.training.deepspeed.engine import Engine, load_layout

LAYERS, QUICK_LAYERS = 30, 2
WIDTH = 64
LENGTH = 12  # tokens of X and of Y
STEPS = 3  # measured at once

Act = Callable[[], None]
# Other programs on the machine do not count in the time of the processor.
_CLOCK, _clock = (
    ("time", clock) if torch.cuda.is_available() else ("processor time", time.process_time)
)


class Side(NamedTuple):
    """One of the two sides of a ratio.

    Attributes:
        step: takes a whole step.
        micro_batch: runs a micro-batch that is not the last.
        clear: removes the gradients that micro-batches have left.
    """

    step: Act
    micro_batch: Act
    clear: Act


def measure(target: Target, setting: Setting) -> Row:
    """Measure a row, on the GPU if there is one."""
    layout, what = target.measure.split("_", 1)
    layers = QUICK_LAYERS if setting.quick else LAYERS
    ours, plain = setting.shared(layout, lambda: _sides(layout, layers))
    part = "a step" if what == "step" else "a micro-batch that is not the last"
    about = (
        f"{_CLOCK} of {part} over plain torch, {layers} layers of width {WIDTH}, "
        f"{2 * LENGTH + BOTTLENECK} tokens, bf16, one rank, one thread"
    )
    return Comparison(_timed(ours, what), _timed(plain, what), about).row(
        target, setting.rounds if setting.quick else 2 * setting.rounds
    )


@contextmanager
def _sides(layout: str, layers: int) -> Iterator[tuple[Side, Side]]:
    """Build the engine and plain torch around equal models; this process then has one thread."""
    world, threads = join(10), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            config = write_model(Path(name), layers)
            batch = pack([ib(LENGTH, LENGTH, config["vocab_size"])]).to(world.device)
            model = embedder(random_model(config, world.device.type, torch.bfloat16))
            with engine_on(Path(name), layout) as engine:
                yield engine_side(engine, batch), plain_side(model, batch)
    finally:
        torch.set_num_threads(threads)


def _timed(side: Side, what: str) -> Callable[[], float]:
    """Return a function that times STEPS steps or micro-batches of one side."""
    act = getattr(side, what)

    def run() -> float:
        act()  # the first of several micro-batches has less to do
        begin = _clock()
        for _ in range(STEPS):
            act()
        seconds = _clock() - begin
        if what == "micro_batch":
            side.clear()
        return seconds

    return run


def plain_side(model: Embedder, batch: PackedBatch) -> Side:
    """Return plain torch: bf16 weights, and fp32 copies that AdamW updates."""
    weights = list(model.parameters())
    masters = [w.detach().float() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=True)

    def micro_batch() -> None:
        loss_of(model(batch), batch).backward()

    def step() -> None:
        micro_batch()
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        torch._foreach_copy_([w.detach() for w in weights], masters)
        clear()

    def clear() -> None:
        for weight in weights:
            weight.grad = None

    return Side(step, micro_batch, clear)


def engine_side(engine: Engine, batch: PackedBatch) -> Side:
    """Return the training engine."""

    def run(last: bool) -> None:
        engine.backward(loss_of(engine.forward(batch), batch), last=last)

    def step() -> None:
        run(True)
        engine.step(1e-6)

    return Side(step, lambda: run(False), step)


def loss_of(total: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean loss of the targets, as stage 1 has it."""
    assert batch.targets is not None
    return total / len(batch.targets)


def write_model(folder: Path, layers: int) -> dict[str, Any]:
    """Write random weights of a narrow model with many layers; return its config.json."""
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    random_model(config, "cpu", torch.bfloat16).save_pretrained(folder)
    Card(BOTTLENECK, 1024, "last", "causal").save(folder)
    return config


@contextmanager
def engine_on(folder: Path, ds_config: str) -> Iterator[Engine]:
    """Build an engine of one rank on the weights of a folder."""
    make = functools.partial(
        build_embedder, folder, activation_checkpointing=False, trust_remote_code=False
    )
    layout = load_layout(ds_config)
    if layout.stage == 3:
        # As in a model of usual width: matrices are sharded, norms are not.
        zero = {**layout.config["zero_optimization"], "stage3_param_persistence_threshold": WIDTH}
        layout = Layout.of(layout.name, {**layout.config, "zero_optimization": zero})
    engine = Engine(make, folder, layout=layout, optim=OptimConfig(lr=1e-6), world=join(10))
    try:
        yield engine
    finally:
        engine.engine.destroy()
