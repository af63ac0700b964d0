"""Suite `stage2`: what a large contrastive batch costs.

1. infonce_memory_16k: memory of InfoNCE and its gradients, in tiles over the score matrix whole.
2. gradcache_memory_16x: memory of a step's learning on 16 times the pairs over once, same chunk.
3. gradcache_over_oneshot: time of a step in chunks over the same step in one forward.
4. matryoshka_over_plain: time of a step with the losses of four prefixes over one without.
5. matryoshka_loss_over_plain: likewise of the loss and its gradients alone, on many candidates.
6. gradcache_zero3_grad_error: two ZeRO-3 ranks in chunks against one graph in plain torch.

Memory: see `peak`. The backbone is the demo's, cut to LAYERS where only memory or equality counts.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter, process_time

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize

from lbr_ds.batching import TextTokenizer, pack
from lbr_ds.batching.contrastive import contrastive_pairs
from lbr_ds.bench.measure import ROUNDS, Row, interleaved, ratio
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World, end, join, leave
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.model.bottleneck import load_tokenizer
from lbr_ds.model.embedder import build_embedder
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.objectives.info_nce import NO_PREFIXES, info_nce
from lbr_ds.records import Record
from lbr_ds.shards import Sample, Step
from lbr_ds.training.deepspeed.library import gathered
from lbr_ds.training.deepspeed.weights import load_weights
from lbr_ds.training.launch import launch
from lbr_ds.training.session import Session, build_engine, build_session
from lbr_ds.training.stages import STAGES, contrastive_loss
from lbr_ds.training.work import Work
from tests.benchmarks.process_memory import extra_bytes
from tests.benchmarks.texts import backbone, pairs, with_stage2

LAYERS, SHORT = 2, 64  # of the cut backbone, and the tokens of its texts
LR = 1e-5
PREFIXES = {384: 1.0, 256: 1.0, 128: 1.0, 64: 1.0}  # of the 576 components of the demo's vectors
QUICK = {
    "rounds": 2,
    "candidates": 1 << 12,
    "memory_pairs": 4,
    "step_pairs": 4,
    "rank_pairs": 4,
    "num_layers": LAYERS,
}


def suite(
    data: Path | None = None,
    rounds: int = ROUNDS,
    candidates: int = 1 << 14,
    memory_pairs: int = 16,
    step_pairs: int = 48,
    rank_pairs: int = 16,
    num_layers: int = 6,
) -> list[Row]:
    """All rows. data: see `material.pairs`."""
    return [
        infonce_memory(candidates),
        gradcache_memory(data, memory_pairs),
        gradcache_time(data, rounds, step_pairs, num_layers),
        matryoshka_time(data, rounds, step_pairs, num_layers),
        matryoshka_loss_time(rounds, candidates // 4),
        zero3_error(data, rank_pairs),
    ]


def infonce_memory(candidates: int, size: int = 576) -> Row:
    """A quarter of the candidates are positives, the rest mined: (C / 4, C) scores."""
    settings = {"queries": candidates // 4, "candidates": candidates, "size": size}
    tiled, whole = (
        extra_bytes("tests.benchmarks.stage2:score", way=way, **settings)
        for way in ("tiled", "whole")
    )
    return _single(
        f"infonce_memory_{candidates >> 10}k",
        tiled / whole,
        goal=0.10,
        floor=0.25,
        about=f"MiB beyond the vectors for loss and gradients, {candidates // 4} queries x "
        f"{candidates} candidates of {size} dimensions: {tiled / 2**20:.0f} in tiles, "
        f"{whole / 2**20:.0f} with the matrix",
    )


def score(
    way: str,
    queries: int,
    candidates: int,
    size: int,
    prefixes: Mapping[int, float] = NO_PREFIXES,
) -> Callable[[], object]:
    """Work for `peak`: the loss of made-up vectors and its gradients; `way`: tiled or whole."""
    generator = torch.Generator().manual_seed(0)
    q, c = (
        normalize(torch.randn(n, size, generator=generator), dim=-1).requires_grad_()
        for n in (queries, candidates)
    )
    numbers = torch.arange(candidates)
    own = numbers[:queries]
    groups = numbers.where(numbers < queries, -1)
    mask = FalseNegatives(own, own[:, None], groups, numbers, numbers >= 0)

    def whole() -> object:
        blocked = mask(slice(None)).scatter_(1, own[:, None], False)
        scores = (q @ c.T / 0.02).masked_fill(blocked, float("-inf"))
        return torch.autograd.grad(cross_entropy(scores, own), (q, c))

    def tiled() -> object:
        loss, _ = info_nce(q, c, temperature=0.02, mask=mask, prefixes=prefixes)
        return torch.autograd.grad(loss, (q, c))

    return {"whole": whole, "tiled": tiled}[way]


def gradcache_memory(data: Path | None, count: int, times: int = 16) -> Row:
    """The larger step's memory over the smaller one's, each in a process of its own."""
    settings = {"data": None if data is None else str(data), "chunk": 8 * SHORT}
    small, large = (
        extra_bytes("tests.benchmarks.stage2:learn", count=n, **settings)
        for n in (count, count * times)
    )
    return _single(
        f"gradcache_memory_{times}x",
        large / small,
        goal=1.05,
        floor=1.10,
        about=f"MiB beyond the engine to learn from {count * times} pairs: {large / 2**20:.0f}, "
        f"from {count}: {small / 2**20:.0f}; chunks of {8 * SHORT} tokens, {LAYERS} layers",
    )


def learn(data: str | None, count: int, chunk: int) -> Callable[[], object]:
    """Work for `peak`: forwards and backwards of one step in chunks, from texts on."""
    session = _session(_cut_run(chunk), join(1))
    records = pairs(None if data is None else Path(data), count)

    def step() -> None:
        work = _work(session.run, session.tokenizer, records)
        totals = session.stage.forward_backward(session, work)
        session.engine.step(0.0, lambda norm, sums: totals.stats(sums)["loss"] > 0, totals.sums)

    return step


def gradcache_time(data: Path | None, rounds: int, count: int, num_layers: int = 6) -> Row:
    """One engine, the same batch whole and in chunks in turn; a whole step with its update."""
    records = pairs(data, count)
    run = with_stage2(backbone(num_layers), micro_batch_tokens=1 << 24)
    session = _session(run, join(1))
    whole = _work(run, session.tokenizer, records)
    # With room for one text more than a quarter: a rest of a few tokens would be a fifth chunk.
    longest = int(whole.micro_batches[0].starts.diff().max())
    chunk = max(run.model.max_length, whole.num_tokens // 4 + longest)
    cut = _work(with_stage2(run, micro_batch_tokens=chunk), session.tokenizer, records)

    measured = interleaved(_step(session, cut), _step(session, whole), rounds)
    return ratio(
        "gradcache_over_oneshot",
        measured,
        goal=1.30,
        better="lower",
        floor=1.40,
        about=f"time of a step on {count} pairs, {whole.num_tokens} tokens, in "
        f"{len(cut.micro_batches)} chunks over one forward; backward counted as two forwards",
        theory=4 / 3,
    )


def _step(session: Session, work: Work) -> Callable[[], float]:
    """A whole step with its update; returns its seconds."""

    def once() -> float:
        begin = perf_counter()
        session.stage.forward_backward(session, work)
        session.engine.step(LR)
        return perf_counter() - begin

    return once


def matryoshka_time(data: Path | None, rounds: int, count: int, num_layers: int = 6) -> Row:
    """One engine and one batch, with and without the prefixes in turn; whole steps."""
    run = with_stage2(backbone(num_layers), micro_batch_tokens=1 << 24)
    engine = build_engine(run, 2, join(1))
    session = build_session(run, 2, engine)
    work = _work(run, session.tokenizer, pairs(data, count))
    nested = build_session(with_stage2(run, matryoshka=PREFIXES), 2, engine)
    measured = interleaved(_step(nested, work), _step(session, work), rounds)
    return ratio(
        "matryoshka_over_plain",
        measured,
        goal=1.02,
        better="lower",
        floor=1.10,
        about=f"time of a step on {count} pairs, {work.num_tokens} tokens, with prefixes of "
        f"{', '.join(map(str, PREFIXES))} components over a step without",
        theory=1.0,
    )


def matryoshka_loss_time(rounds: int, queries: int, size: int = 576) -> Row:
    """Four candidates for each query; processor time of the loss and its gradients."""
    plain = score("tiled", queries, 4 * queries, size)
    nested = score("tiled", queries, 4 * queries, size, PREFIXES)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            begin = process_time()
            work()
            return process_time() - begin

        return once

    measured = interleaved(timed(nested), timed(plain), rounds)
    return ratio(
        "matryoshka_loss_over_plain",
        measured,
        goal=1.5,
        better="lower",
        floor=3.0,
        about=f"processor time of InfoNCE and its gradients, {queries} queries x {4 * queries} "
        f"candidates of {size} dimensions, with prefixes of {', '.join(map(str, PREFIXES))} over "
        "without; theory: the products alone",
        theory=1 + sum(PREFIXES) / size,
    )


def zero3_error(data: Path | None, count: int) -> Row:
    """Relative distance of all parameters' gradients together.

    The weights are drawn, so that the texts' vectors lie apart. Those of the pretrained backbone
    have cosines near 0.99 before training; there fp32 alone is off by 7e-6, one graph or many.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = _in_folder(Path(folder))
        _draw_weights(run.run / "backbone")
        arguments = [folder, "" if data is None else str(data), str(count)]
        if launch(arguments, 2, module="tests.benchmarks.stage2"):
            raise EnvironmentProblem("gradcache_zero3_grad_error: a rank failed; see above")
        found = torch.load(run.run / "gradients.pt", weights_only=True)
        wanted = _one_graph(run, pairs(data, count))
    apart = sum((found[n] - w).double().square().sum() for n, w in wanted.items())
    norm = sum(w.double().square().sum() for w in wanted.values())
    return _single(
        "gradcache_zero3_grad_error",
        float((apart / norm) ** 0.5),
        goal=1e-6,
        floor=1e-5,
        about=f"|g - g'| / |g'| over all parameters, fp32, {count} pairs, {LAYERS} layers: g of "
        "two ZeRO-3 ranks in chunks, g' of one graph in plain torch; drawn weights (with "
        "pretrained ones, whose vectors all but coincide, fp32 itself is 7e-6 from fp64)",
        unit="relative",
    )


def _one_graph(run: RunConfig, records: list[Record]) -> dict[str, torch.Tensor]:
    """The gradient of the whole step by autograd alone: no engine, no chunks, no ranks."""
    folder = run.run / "backbone"
    model = build_embedder(
        folder, torch.float32, activation_checkpointing=False, trust_remote_code=False
    )
    load_weights(model.backbone.named_parameters(), folder, World(), gathered)
    step = contrastive_pairs(records, [0] * len(records), _encoder(run), 0)
    vectors = model(pack(step.sequences))
    loss, _ = contrastive_loss(vectors, step, World(), temperature=run.stage2.temperature)
    loss.backward()
    return {n: p.grad for n, p in model.backbone.named_parameters() if p.grad is not None}


def _in_folder(folder: Path) -> RunConfig:
    """The cut run, in chunks, with `folder` as its own; the backbone is copied there once."""
    run = _cut_run(4 * SHORT)
    if not (folder / "backbone").exists():
        shutil.copytree(run.run / "backbone", folder / "backbone")
    return run.model_copy(update={"run": folder})


def _draw_weights(folder: Path) -> None:
    """Matrices from a normal of width 0.02, all else 1, in place of what was learnt."""
    generator = torch.Generator().manual_seed(0)
    for path in folder.glob("*.safetensors"):
        drawn = {
            name: 0.02 * torch.randn(old.shape, generator=generator)
            if old.ndim == 2
            else torch.ones_like(old)
            for name, old in load_file(path).items()
        }
        save_file(drawn, path, metadata={"format": "pt"})


def _rank(folder: Path, data: Path | None, count: int) -> None:
    """One of the two ranks: its lanes of the step, in chunks; rank 0 writes the gradient."""
    run, world = _in_folder(folder), join(2)
    session = _session(run, world)
    mine = pairs(data, count)[world.rank :: world.size]
    session.stage.forward_backward(session, _work(run, session.tokenizer, mine))
    gradients = dict(session.engine.gradients())
    if world.first:
        torch.save(gradients, folder / "gradients.pt")
    leave()


def _session(run: RunConfig, world: World) -> Session:
    return build_session(run, 2, build_engine(run, 2, world))


def _cut_run(chunk: int) -> RunConfig:
    """Few layers and short texts, each step in chunks of `chunk` tokens."""
    return with_stage2(backbone(LAYERS, SHORT), micro_batch_tokens=chunk)


def _encoder(run: RunConfig) -> TextTokenizer:
    return TextTokenizer(
        load_tokenizer(run.run / "backbone"),
        max_length=run.model.max_length,
        num_bottleneck=run.bottleneck.count,
    )


def _work(run: RunConfig, tokenizer: TextTokenizer, records: list[Record]) -> Work:
    """What a rank's loader would make of these records."""
    samples = [Sample(lane, 0, record, 0, lane) for lane, record in enumerate(records)]
    return STAGES[2].collate(run, tokenizer, Step(0, samples, 0))


def _single(
    measure: str, value: float, *, goal: float, floor: float, about: str, unit: str = "ratio"
) -> Row:
    """A row of one measurement, in which nothing is left to the machine's mood; lower is better."""
    return Row(measure, value, unit, goal, "lower", floor, (value, value), 1, about)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, int(sys.argv[3]))
    end(0)
