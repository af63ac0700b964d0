"""STAGES: what a stage collates and how it learns. The only place that knows there are two.

A stage is a value. `collate` turns a rank's share of a step into micro-batches on the CPU (in a
loader process); `learn` runs forwards and backwards for them and leaves the gradient of the whole
step's loss on the engine. Both see to it that the result depends neither on how a step is cut into
micro-batches nor on how many ranks share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, Sequence, TextEncoder, pack, split_by_tokens
from lbr_ds.batching.contrastive import Pairs, contrastive_pairs
from lbr_ds.batching.generative import draw, generative_sequence
from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.objectives.contrastive import info_nce
from lbr_ds.shards import Step
from lbr_ds.train.engine import Engine

Stats = dict[str, float]


@dataclass(frozen=True)
class Work:
    """A rank's share of one step, ready to learn from."""

    step: int
    samples: int
    skipped: int
    micro_batches: list[PackedBatch]
    names: list[tuple[str, int, int]]  # of each sample: record id, shard, row in it
    pairs: Pairs | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(m.num_tokens for m in self.micro_batches)

    @property
    def num_targets(self) -> int:
        """Supervised tokens (stage 1)."""
        return sum(len(m.targets) for m in self.micro_batches if m.targets is not None)


@dataclass(frozen=True)
class Stage:
    """collate(run, encoder, step) -> Work; learn(engine, work, run, world) -> stats of the step."""

    number: int
    split: str
    collate: Callable[[RunConfig, TextEncoder, Step], Work]
    learn: Callable[[Engine, Work, RunConfig, World], Stats]


def names(step: Step) -> list[tuple[str, int, int]]:
    """What to call a step's samples when something is wrong with it."""
    return [(sample.record.id, sample.shard, sample.row) for sample in step.samples]


def cut(sequences: list[Sequence], budget: int) -> list[PackedBatch]:
    """Packed micro-batches of at most `budget` tokens, in order."""
    return [pack([sequences[i] for i in chosen]) for chosen in split_by_tokens(sequences, budget)]


def collate_generative(run: RunConfig, encoder: TextEncoder, step: Step) -> Work:
    """Each sample's objective is drawn by (seed, epoch, record), so a mixture resumes exactly."""
    sequences = []
    for sample in step.samples:
        key = (run.seed, sample.epoch, step.index, sample.lane)
        objective = draw(run.stage1.objective, *key)
        sequences.append(
            generative_sequence(
                sample.record, objective, encoder,
                turn=sample.epoch, max_target_length=run.stage1.max_target_length,
            )
        )  # fmt: skip
    batches = cut(sequences, run.stage1.micro_batch_tokens)
    return Work(step.index, len(sequences), step.skipped, batches, names(step))


def learn_generative(engine: Engine, work: Work, run: RunConfig, world: World) -> Stats:
    """Loss = sum over supervised tokens of all ranks / their number."""
    (targets,) = world.sum(work.num_targets)
    count = agreed_count(work.micro_batches, world)
    total = torch.zeros((), dtype=torch.float64)
    for index in range(count):
        batch, weight = micro_batch(work.micro_batches, index)
        loss = engine(batch.to(world.device))
        # DeepSpeed averages over ranks; times size / targets makes that the mean over the step.
        engine.backward(loss * (weight * world.size / targets), last=index == count - 1)
        total += loss.detach().double().cpu() * weight
    (loss_sum,) = world.sum(total.item())
    return {"loss": loss_sum / targets, "target_tokens": targets}


def collate_contrastive(run: RunConfig, encoder: TextEncoder, step: Step) -> Work:
    """Queries first, then candidates; a micro-batch may hold some of each."""
    records = [sample.record for sample in step.samples]
    turns = [sample.epoch for sample in step.samples]
    pairs = contrastive_pairs(records, turns, encoder, run.stage2.num_negatives)
    batches = cut(pairs.sequences, run.stage2.micro_batch_tokens)
    return Work(step.index, len(records), step.skipped, batches, names(step), pairs)


def learn_contrastive(engine: Engine, work: Work, run: RunConfig, world: World) -> Stats:
    """InfoNCE over the whole step, in one forward if it fits, else by gradient caching."""
    assert work.pairs is not None
    count = agreed_count(work.micro_batches, world)
    if count == 1:
        vectors = engine(work.micro_batches[0].to(world.device))
        loss, stats = _contrast(vectors, work.pairs, run, world)
        # The share of each rank adds up to the step's loss; DeepSpeed's average divides by size.
        engine.backward(loss * world.size, last=True)
    else:
        stats = _learn_cached(engine, work, count, run, world)
    names = sorted(stats)
    sums = world.sum(*(float(stats[n]) for n in names), float(work.samples))
    return {name: value / sums[-1] for name, value in zip(names, sums, strict=False)}


def _contrast(
    vectors: Tensor, pairs: Pairs, run: RunConfig, world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    n = pairs.num_queries
    return info_nce(vectors[:n], vectors[n:], pairs, run.stage2.temperature, world)


def _learn_cached(
    engine: Engine, work: Work, count: int, run: RunConfig, world: World
) -> dict[str, Tensor]:
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983), through the engine.

    1. Encode every micro-batch without a graph. 2. The loss of the whole step and its gradient with
    respect to the vectors. 3. Encode each micro-batch again and send its part of that gradient on.
    """
    pieces = []
    with torch.no_grad():
        for index in range(count):
            batch, weight = micro_batch(work.micro_batches, index)
            vectors = engine(batch.to(world.device))
            if weight:
                pieces.append(vectors)
    cached = torch.cat(pieces).requires_grad_()
    loss, stats = _contrast(cached, work.pairs, run, world)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(loss * world.size, cached)
    parts = slope.split([m.num_sequences for m in work.micro_batches])
    for index in range(count):
        batch, weight = micro_batch(work.micro_batches, index)
        vectors = engine(batch.to(world.device))
        surrogate = (vectors * parts[index if weight else 0]).sum() * weight
        engine.backward(surrogate, last=index == count - 1)
    return stats


def agreed_count(batches: list[PackedBatch], world: World) -> int:
    """How many micro-batches every rank runs: ZeRO-3 hangs if they differ."""
    return int(world.max(len(batches))[0])


def micro_batch(batches: list[PackedBatch], index: int) -> tuple[PackedBatch, float]:
    """(batch, 1), or past the end the first one again with weight 0 to keep step with others."""
    return (batches[index], 1.0) if index < len(batches) else (batches[0], 0.0)


def rehearse(
    engine: Engine, stage: Stage, run: RunConfig, encoder: TextEncoder, world: World
) -> None:
    """One pass at the largest micro-batch, with weight 0: memory faults come now."""
    ids = encoder.wrap([encoder.tokenizer.eos_token_id] * encoder.max_length)
    target = []
    if stage.number == 1:
        target = [encoder.tokenizer.eos_token_id] * run.stage1.max_target_length
    cut_off = run.bottleneck.count > 0
    sequence = Sequence(ids, run.bottleneck.count, target, cut=cut_off)
    fits = max(1, run.stage(stage.number).micro_batch_tokens // len(sequence))
    result = engine(pack([sequence] * fits).to(world.device))
    # The zero gradients stay on the engine and the first real ones are added to them.
    engine.backward(result.sum() * 0.0, last=False)


STAGES = {
    1: Stage(1, "gl", collate_generative, learn_generative),
    2: Stage(2, "cl", collate_contrastive, learn_contrastive),
}
