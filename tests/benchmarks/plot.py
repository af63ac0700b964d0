"""Time and memory of a training step against length and batch: IB, plain SFT, dense mask.

Two layers of SmolLM2-135M's shape stand for thirty: what differs between the three ways, attention
and the head's rows, is measured, and the sweep takes a minute or two and not an hour.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbr_ds.batching import Sequence, pack
from lbr_ds.bench.attention import dense_ib_mask
from lbr_ds.bench.peak_memory import peak_bytes
from lbr_ds.bench.steps import with_ours
from lbr_ds.bench.workload import SMALL, embedder, ib, plain, random_model
from lbr_ds.cluster.device import clock
from lbr_ds.model.embedder import Embedder
from lbr_ds.system.atomic import atomic_file, write_text
from tests.benchmarks.texts import TINY

LAYERS = 2
LENGTHS = (128, 256, 512, 1024, 2048)  # tokens of X, and of Y, one sequence a step
BATCHES = (1, 2, 4, 8, 16)  # sequences of X = Y = 128 a step
QUICK = {"rounds": 1, "lengths": (8, 16), "batches": (1, 2), "config": TINY}
NAMES = {"ib": "IB (ours)", "sft": "plain SFT", "dense": "IB, dense 4D mask"}
_COLOURS = {"ib": "#0b6e4f", "sft": "#8a8d91", "dense": "#c8553d"}


def sweep(
    rounds: int = 3,
    lengths: tuple[int, ...] = LENGTHS,
    batches: tuple[int, ...] = BATCHES,
    config: dict[str, Any] = SMALL,
) -> list[dict[str, Any]]:
    """A point for each way, length and batch: seconds (median) and MiB beyond the weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = embedder(random_model({**config, "num_hidden_layers": LAYERS}, device, dtype))
    places = [(n, 1) for n in lengths] + [(lengths[0], b) for b in batches if b > 1]
    points = []
    for length, batch in places:
        ways = {name: way(model, name, length, batch, device) for name in NAMES}
        peaks = {name: peak_bytes(run, device) / 2**20 for name, run in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds):
            for name, run in ways.items():
                begin = clock()
                run()
                seconds[name].append(clock() - begin)
        points += [
            {
                "way": name,
                "length": length,
                "batch": batch,
                "seconds": statistics.median(seconds[name]),
                "mib": peaks[name],
            }
            for name in NAMES
        ]
    return points


def way(model: Embedder, name: str, length: int, batch: int, device: str) -> Callable[[], None]:
    """Forward and backward of one step; the gradients are dropped."""
    vocab = model.backbone.config.vocab_size
    make = plain if name == "sft" else ib
    sequences = [make(length, length, vocab) for _ in range(batch)]
    loss = dense(model, sequences, device) if name == "dense" else ours(model, sequences, device)

    def run() -> None:
        loss().backward()
        model.zero_grad()

    return run


def ours(model: Embedder, sequences: list[Sequence], device: str) -> Callable[[], Tensor]:
    """The loss of a packed batch."""
    packed = pack(sequences).to(torch.device(device))
    return lambda: with_ours(model)(packed)


def dense(model: Embedder, sequences: list[Sequence], device: str) -> Callable[[], Tensor]:
    """The model's own loss under a dense mask; the sequences are of one length."""
    tokens = torch.tensor([s.context + s.target for s in sequences], device=device)
    labels = tokens.clone()
    labels[:, : len(sequences[0].context)] = -100
    mask = dense_ib_mask(sequences[0]).to(device)[None, None].expand(len(sequences), -1, -1, -1)

    def run() -> Tensor:
        model.backbone.set_attn_implementation("sdpa")
        return model.backbone(tokens, attention_mask=mask, labels=labels, use_cache=False).loss

    return run


def draw(points: list[dict[str, Any]], path: Path, machine: str) -> None:
    """The four curves as a PNG, or as an HTML page that holds it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = min(p["length"] for p in points)
    panels = {
        "length": [p for p in points if p["batch"] == 1],
        "batch": [p for p in points if p["length"] == first],
    }
    labels = {
        "length": "tokens of X and of Y, one sequence",
        "batch": f"sequences of X = Y = {first} tokens",
    }
    units = {"seconds": "seconds a step", "mib": "MiB beyond the weights"}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for row, unit in enumerate(units):
        for column, (against, chosen) in enumerate(panels.items()):
            axis = axes[row][column]
            for name, label in NAMES.items():
                own = sorted((p for p in chosen if p["way"] == name), key=lambda p: p[against])
                xs, ys = [p[against] for p in own], [p[unit] for p in own]
                axis.plot(xs, ys, marker="o", markersize=4, color=_COLOURS[name], label=label)
            axis.set_xscale("log", base=2)
            ticks = sorted({p[against] for p in chosen})
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            axis.set_xlabel(labels[against])
            axis.set_ylabel(units[unit])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.suptitle(
        f"A stage-1 step, forward and backward, {LAYERS} layers of SmolLM2-135M's shape\n{machine}",
        fontsize=11,
    )
    if path.suffix == ".png":
        with atomic_file(path) as file:
            figure.savefig(file, dpi=150)
    else:
        held = io.BytesIO()
        figure.savefig(held, format="png", dpi=150)
        image = base64.b64encode(held.getvalue()).decode()
        write_text(
            path,
            "<!doctype html><meta charset=utf-8><title>LBR-DS benchmarks</title>"
            f"<img alt='time and memory of a step' style='max-width:100%' "
            f"src='data:image/png;base64,{image}'>\n",
        )
    plt.close(figure)
