"""STAGES: what a stage collates and how it learns. Which split each trains on: config/stages.py.

A stage is a value. `collate` turns a rank's share of a step into micro-batches on the CPU (in a
loader process); `learn` runs forwards and backwards for them and leaves the gradient of the whole
step's loss on the engine. Both see to it that the result depends neither on how a step is cut into
micro-batches nor on how many ranks share it.

Which sequences share a micro-batch follows from their lengths alone, so that few and full ones
come out (`fill_by_tokens`). Ranks keep the samples of their own lanes: a rank reads and tokenises
nothing else, so to even out tokens among ranks each would have to read the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lbr_ds.batching import PackedBatch, Sequence, TextEncoder, fill_by_tokens, pack
from lbr_ds.batching.contrastive import Pairs, contrastive_pairs
from lbr_ds.batching.generative import draw, generative_sequence, with_bag
from lbr_ds.config import RunConfig, stages
from lbr_ds.distributed import World
from lbr_ds.objectives.contrastive import info_nce
from lbr_ds.shards import Step
from lbr_ds.train.deepspeed.engine import Engine

Stats = dict[str, float]


@dataclass(frozen=True)
class Work:
    """A rank's share of one step, ready to learn from.

    members: for each micro-batch the numbers of its sequences within the step, int64.
    """

    step: int
    samples: int
    skipped: int
    micro_batches: list[PackedBatch]
    members: list[Tensor]
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

    @property
    def num_bags(self) -> int:
        """Texts whose words are to be told at once (stage 1)."""
        return sum(len(m.bags.read) for m in self.micro_batches if m.bags is not None)


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


def cut(sequences: list[Sequence], budget: int) -> tuple[list[PackedBatch], list[Tensor]]:
    """Packed micro-batches of at most `budget` tokens, and which sequences each one holds."""
    chosen = fill_by_tokens(sequences, budget)
    batches = [pack([sequences[i] for i in numbers]) for numbers in chosen]
    return batches, [torch.tensor(numbers) for numbers in chosen]


def collate_generative(run: RunConfig, encoder: TextEncoder, step: Step) -> Work:
    """Draw each sample's objective by (seed, epoch, step, lane): a mixture resumes exactly."""
    sequences = []
    for sample in step.samples:
        key = (run.seed, sample.epoch, step.index, sample.lane)
        objective = draw(run.stage1.objective, *key)
        sequence = generative_sequence(
            sample.record,
            objective,
            encoder,
            turn=sample.epoch,
            max_target_length=run.stage1.max_target_length,
        )
        sequences.append(with_bag(sequence, encoder) if run.stage1.bag_of_words else sequence)
    batches, members = cut(sequences, run.stage1.micro_batch_tokens)
    return Work(step.index, len(sequences), step.skipped, batches, members, names(step))


def learn_generative(engine: Engine, work: Work, run: RunConfig, world: World) -> Stats:
    """Loss = sum over supervised tokens of all ranks / their number; that of bags likewise."""
    targets, bags = world.sum(work.num_targets, work.num_bags)
    shares = torch.tensor([1 / targets, run.stage1.bag_of_words / max(bags, 1)])
    count = agreed_count(work.micro_batches, world)
    totals = torch.zeros(2, dtype=torch.float64)
    for index in range(count):
        found, weight = forward(engine, work, index, run, world)
        sums = torch.atleast_1d(found)
        # DeepSpeed averages over ranks; times size / targets makes that the mean over the step.
        loss = sums @ shares[: len(sums)].to(sums)
        engine.backward(loss * (weight * world.size), last=index == count - 1)
        totals[: len(sums)] += sums.detach().double().cpu() * weight
    told, bagged = world.sum(*totals.tolist())
    stats = {"loss": told / targets, "target_tokens": targets}
    return {**stats, "bag_loss": bagged / bags} if bags else stats


def collate_contrastive(run: RunConfig, encoder: TextEncoder, step: Step) -> Work:
    """Queries first, then candidates; a micro-batch may hold some of each.

    A share that fits micro_batch_tokens stays whole; one that does not is cut by chunk_tokens.
    """
    records = [sample.record for sample in step.samples]
    turns = [sample.epoch for sample in step.samples]
    pairs = contrastive_pairs(records, turns, encoder, run.stage2.num_negatives)
    budget = whole = run.stage2.micro_batch_tokens
    if sum(len(sequence) for sequence in pairs.sequences) > whole:
        budget = run.stage2.chunk_tokens or whole
    batches, members = cut(pairs.sequences, budget)
    pairs = replace(pairs, sequences=[])  # they are in the micro-batches now
    return Work(step.index, len(records), step.skipped, batches, members, names(step), pairs)


def learn_contrastive(engine: Engine, work: Work, run: RunConfig, world: World) -> Stats:
    """InfoNCE over the whole step, in one forward if it fits, else by gradient caching."""
    assert work.pairs is not None
    count = agreed_count(work.micro_batches, world)
    if count == 1:
        vectors, _ = forward(engine, work, 0, run, world)
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
    n, part = pairs.num_queries, run.stage2
    return info_nce(
        vectors[:n], vectors[n:], pairs, part.temperature, world, part.false_negative_margin
    )


def _learn_cached(
    engine: Engine, work: Work, count: int, run: RunConfig, world: World
) -> dict[str, Tensor]:
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983), through the engine.

    1. Encode every micro-batch without a graph. 2. The loss of the whole step and its gradient with
    respect to the vectors. 3. Encode each micro-batch again and send its part of that gradient on.

    Of a larger step only the vectors and their gradient grow on the device: (sequences, D) fp32
    each. Both encodings visit the modules in one order, so ZeRO-3's prefetch trace stays valid.
    """
    assert work.pairs is not None
    members = [numbers.to(world.device) for numbers in work.members]
    cached: Tensor | None = None
    with torch.no_grad():
        for index in range(count):
            vectors, weight = forward(engine, work, index, run, world)
            if cached is None:
                total = sum(len(numbers) for numbers in members)
                cached = vectors.new_empty(total, vectors.shape[1])
            if weight:
                cached[members[index]] = vectors
    assert cached is not None
    cached.requires_grad_()
    loss, stats = _contrast(cached, work.pairs, run, world)
    (slope,) = torch.autograd.grad(loss * world.size, cached)
    with engine.cached_backwards():
        for index in range(count):
            vectors, weight = forward(engine, work, index, run, world)
            surrogate = (vectors * slope[members[index if weight else 0]]).sum() * weight
            engine.backward(surrogate, last=index == count - 1)
    return stats


def forward(
    engine: Engine, work: Work, index: int, run: RunConfig, world: World
) -> tuple[Tensor, float]:
    """What the model makes of micro-batch `index`, and the weight with which it counts.

    Dropout is drawn by (seed, step, rank, index): gradient caching encodes a chunk twice and must
    drop the same numbers both times, and a resumed step drops what it would have.
    """
    batch, weight = micro_batch(work.micro_batches, index)
    if run.lora.rank is not None and run.lora.dropout:
        words = [run.seed % (1 << 32), work.step, world.rank, index]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
    return engine(batch.to(world.device)), weight


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
    1: Stage(1, stages.STAGES[1].split, collate_generative, learn_generative),
    2: Stage(2, stages.STAGES[2].split, collate_contrastive, learn_contrastive),
}
